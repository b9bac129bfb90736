"""Triton kernels that work row by row: RMSNorm, with and without the residual, and SwiGLU.

One program per row, so a row's result does not depend on how many others there are. Called by
`common.model.triton.decoder`; the reference is `common.model.llama`, whose roundings they follow.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(
    x, residual, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    values = tl.load(x + row + columns, mask=inside, other=0.0)
    if ADD:
        old = tl.load(residual + row + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + old.to(tl.float32)).to(old.dtype)
        tl.store(residual + row + columns, values, mask=inside)
    wide = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / SIZE + eps)
    normed = (wide * scale).to(values.dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (normed * factor).to(values.dtype), mask=inside)


@triton.jit
def _swiglu(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    result = (active * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + row * SIZE + columns, result, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [rows, size], contiguous. Returns the same shape and dtype."""
    out = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _rms_norm[(len(x),)](
        x, x, weight, out, eps, SIZE=size, BLOCK=block, ADD=False, num_warps=_warps(block)
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`residual += x`, in place, then its norm. All [rows, size], contiguous."""
    out = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _rms_norm[(len(x),)](
        x, residual, weight, out, eps, SIZE=size, BLOCK=block, ADD=True, num_warps=_warps(block)
    )
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up: [rows, 2 * size], gate first. Returns [rows, size]."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    block = min(1024, triton.next_power_of_2(size))
    _swiglu[(rows, triton.cdiv(size, block))](gate_up, out, SIZE=size, BLOCK=block, num_warps=4)
    return out


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))
