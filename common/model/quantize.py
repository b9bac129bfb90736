"""Weights in 8 or 4 bits: how a matrix is quantised, and what it then computes, in plain torch.

`common.model.weights` quantises each matrix as it is read; `common.model.native` computes with
them, and `product` is the reference for it. Ready checkpoint formats need only make
`QuantizedMatrix` from what they find.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.functional import linear, pad


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix, and what it is multiplied with, is rounded."""

    bits: int
    """Of a weight: 8 or 4, symmetric around zero."""
    group: int | None
    """Weights of a row that share a scale, a multiple of 8; None: the whole row."""
    activation_bits: int
    """Of the other operand, with one scale per token, computed as it comes: 8 or 16."""


INT8: Final = Scheme(8, None, 16)
SCHEMES: Final = {"int8": INT8, "int4": Scheme(4, 128, 16), "w8a8": Scheme(8, None, 8)}
"""Of the matrices of the layers, by the value of `--quantize`."""
HEAD_SCHEME: Final = INT8
"""Of the output head: few rows pass through it, so that exact activations cost nothing, and its
errors reach the token directly. The embedding is not quantised: a step reads a row of it."""
LIMITS: Final = {8: 127, 4: 7}
DIGIT_LIMITS: Final = {8: 127, 16: 32512}
"""Largest magnitude of an activation: 16 bits are two digits of 8, the higher counting 256."""
CLIPS: Final = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
"""Parts of the largest weight of a group that become the largest value; the best of them is taken
(least squares). What is larger is clipped, and the rest gains precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """[out, in] as whole numbers and scales."""

    values: torch.Tensor
    """[out, in] int8"""
    scales: torch.Tensor
    """[out, groups] float32: value times scale is the weight."""
    scheme: Scheme
    dtype: torch.dtype
    """Of the matrix that it stands for."""

    def dequantize(self) -> torch.Tensor:
        """[out, in] float32."""
        columns = self.values.shape[1]
        size = self.scheme.group or columns
        return self.values * self.scales.repeat_interleave(size, 1)[:, :columns]


Matrix = torch.Tensor | QuantizedMatrix


def quantize(matrix: torch.Tensor, scheme: Scheme) -> QuantizedMatrix:
    """Round [out, in] to nearest."""
    rows, columns = matrix.shape
    size = scheme.group or columns
    # [out, groups, size]
    groups = pad(matrix.float(), (0, -columns % size)).view(rows, -1, size)
    most = groups.abs().amax(-1, keepdim=True)
    limit = LIMITS[scheme.bits]
    best = torch.full_like(most, float("inf"))
    values, scales = torch.zeros_like(groups), torch.zeros_like(most)
    for clip in CLIPS[scheme.bits]:
        scale = most * (clip / limit)
        rounded = (groups / scale).nan_to_num(0).round().clamp(-limit, limit)
        error = (rounded * scale - groups).square().sum(-1, keepdim=True)
        values = torch.where(error < best, rounded, values)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(best, error)
    return QuantizedMatrix(
        values=values.flatten(1)[:, :columns].to(torch.int8).contiguous(),
        scales=scales[..., 0].contiguous(),
        scheme=scheme,
        dtype=matrix.dtype,
    )


def round_activations(x: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., in] rounded to whole multiples of one scale per row; float32."""
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True)
    limit = torch.full_like(most, DIGIT_LIMITS[bits])
    # Not a number through a tensor, which torch computes by the reciprocal, rounding twice.
    digits = (wide * (limit / most).nan_to_num(0, posinf=0)).round()
    return digits * (most / limit)


def product(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias in the dtype of `x`, for a matrix of either kind."""
    if isinstance(matrix, torch.Tensor):
        return linear(x, matrix, bias)
    y = linear(round_activations(x, matrix.scheme.activation_bits), matrix.dequantize())
    return (y if bias is None else y + bias).to(x.dtype)
