"""Rotary position embeddings, computed as transformers computes them.

Frequencies, angles, cosines and sines are float32 and only then cast to the model's dtype, so
that float32 results are equal and bfloat16 ones differ by rounding alone. The runner makes one
`Rotary` per model and one pair of tables per step; every layer applies the same pair.
"""

import math

import torch

from common.model.rope_spec import RopeSpec


class Rotary:
    """The frequencies of one model on one device."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device) -> None:
        frequencies, self.scale = inverse_frequencies(spec, head_dim)
        self._frequencies = frequencies.to(device)

    def tables(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin for `positions` [tokens], each [tokens, 1, head_dim].

        The sign of `rotate_half` is in the sine: `rotate_half(x) * sin == roll(x) * signed_sin`,
        where roll swaps the two halves of a head.
        """
        angles = positions[:, None].float() * self._frequencies  # [tokens, head_dim / 2]
        cos = angles.cos() * self.scale
        sin = angles.sin() * self.scale
        return (
            torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
            torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
        )


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """Rotate `heads` [tokens, heads, head_dim] in place."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    heads.mul_(cos).add_(swapped.mul_(signed_sin))


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies [head_dim / 2] in float32, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return plain / spec.factor, 1.0
    if spec.kind == "llama3":
        return _llama3(spec, plain), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, head_dim), _yarn_scale(spec)
    assert spec.kind == "default", spec.kind
    return plain, 1.0


def _llama3(spec: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / plain
    long = spec.original_max_positions / spec.low_freq_factor
    short = spec.original_max_positions / spec.high_freq_factor
    scaled = torch.where(wavelengths > long, plain / spec.factor, plain)
    smooth = (spec.original_max_positions / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    between = (1 - smooth) * scaled / spec.factor + smooth * scaled
    return torch.where((wavelengths >= short) & (wavelengths <= long), between, scaled)


def _yarn(spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, ramp between."""

    def dimension(rotations: float) -> float:
        turns = spec.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    powers = spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1.0 / (spec.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_scale(spec: RopeSpec) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)
