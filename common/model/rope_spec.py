"""Which rotary embedding a checkpoint uses, read from `config.json`. No torch in this module.

Called by `common.model.spec`; `common.model.rope` computes from the result.
"""

from dataclasses import dataclass
from typing import Any, Final

from common.errors import ModelError

ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA: Final = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Base, kind and scaling of the rotary embedding; fields of other kinds keep defaults."""

    kind: str = "default"
    """`default`, `linear`, `llama3` or `yarn`."""
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    original_max_positions: int = 0
    """Context of pre-training in tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None: what the paper suggests."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def max_positions(self, declared: int) -> int:
        """Longest usable context, where config.json declares `declared` tokens.

        Checkpoints with YaRN declare either the original or the extended context; this takes the
        larger of the two.
        """
        if self.kind == "yarn":
            return max(declared, int(self.original_max_positions * self.factor))
        return declared


def read_rope(config: dict[str, Any], declared_positions: int) -> RopeSpec:
    """The rope of a config, written either as `rope_theta` and `rope_scaling` or, since
    transformers 5, as `rope_parameters`. Raises ModelError for what is not supported."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ModelError(f"config.json: rope parameters are {parameters!r}, not an object")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ModelError("config.json: rope parameters per kind of layer are not supported")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor {partial} is not supported; supported: 1.0")

    theta = _number(
        parameters, "rope_theta", kind, _number(config, "rope_theta", kind, DEFAULT_THETA)
    )
    if kind in ("default", "dynamic"):
        # Dynamic NTK scaling changes frequencies only past max_position_embeddings, where KV that
        # is already cached would be of other frequencies; Tandem serves up to there.
        return RopeSpec(theta=theta)
    factor = parameters.get("factor")
    if factor is None and kind == "yarn" and "original_max_position_embeddings" in parameters:
        factor = declared_positions / parameters["original_max_position_embeddings"]
    if not isinstance(factor, int | float) or factor < 1:
        raise ModelError(f"rope type {kind!r} needs a factor of at least 1, not {factor!r}")
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, factor=float(factor))
    # Outside the rope parameters it takes precedence, as in transformers.
    original = (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or declared_positions
    )
    if not isinstance(original, int) or original <= 0:
        raise ModelError(f"config.json: original_max_position_embeddings is {original!r}")
    if kind == "llama3":
        low = _number(parameters, "low_freq_factor", kind)
        high = _number(parameters, "high_freq_factor", kind)
        if high <= low:
            raise ModelError(f"rope type 'llama3' needs high_freq_factor {high} above {low}")
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=float(factor),
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeSpec(
        kind=kind,
        theta=theta,
        factor=float(factor),
        original_max_positions=original,
        beta_fast=_number(parameters, "beta_fast", kind, 32.0),
        beta_slow=_number(parameters, "beta_slow", kind, 1.0),
        attention_factor=_optional(parameters, "attention_factor", kind),
        mscale=_optional(parameters, "mscale", kind),
        mscale_all_dim=_optional(parameters, "mscale_all_dim", kind),
        truncate=bool(parameters.get("truncate", True)),
    )


def _optional(parameters: dict[str, Any], name: str, kind: str) -> float | None:
    return None if parameters.get(name) is None else _number(parameters, name, kind)


def _number(
    parameters: dict[str, Any], name: str, kind: str, default: float | None = None
) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"rope type {kind!r} needs {name} above 0, not {value!r}")
    return float(value)
