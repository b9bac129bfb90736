"""The hardware that is simulated: what computing costs, memory and links, from a JSON file."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.cost import CostModel
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of worker. The default: Llama-3-70B on 8 x H200, blocks of 512 tokens."""

    prefill_s: float = 0.012
    token_s: float = 5.0e-5
    pair_s: float = 8.3e-10
    step_s: float = 0.008
    row_s: float = 3e-5
    kv_s: float = 1.2e-8
    kv_bytes_per_token: float = 327_680
    link_bytes_per_s: float = 160e9
    block_tokens: int = 512
    prefill_blocks: int = 5_000
    """Blocks that a prefill worker holds."""
    decode_blocks: int = 5_000
    max_num_seqs: int = 256
    """Sequences in one decode step."""
    chunk_tokens: int = 0
    """Prompt tokens per prefill step, each of which costs `prefill_s`; 0: a prompt is one step."""

    local_chunk_tokens: int = 256
    """Prompt tokens that a decode worker computes in one step beside its residents."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO):
                raise ConfigError(f"model: {field.name} must be positive, not {value}")

    @property
    def cost(self) -> CostModel:
        return CostModel(
            prefill_s=self.prefill_s,
            token_s=self.token_s,
            pair_s=self.pair_s,
            step_s=self.step_s,
            row_s=self.row_s,
            kv_s=self.kv_s,
        )

    def prefill(self, new: int, cached: int) -> float:
        """Seconds in which a prefill worker computes `new` tokens after `cached` ones."""
        steps = -(-new // self.chunk_tokens) if self.chunk_tokens else 1
        return self.prefill_s * (steps - 1) + self.cost_prefill(new, cached)

    def cost_prefill(self, new: int, cached: int) -> float:
        return self.prefill_s + new * (self.token_s + self.pair_s * (cached + new / 2))

    def transfer(self, tokens: int) -> float:
        """Seconds in which the KV of `tokens` tokens crosses a link."""
        return tokens * self.kv_bytes_per_token / self.link_bytes_per_s


_MAY_BE_ZERO = ("prefill_s", "pair_s", "row_s", "kv_s", "chunk_tokens")
_COUNTS = (
    "block_tokens",
    "prefill_blocks",
    "decode_blocks",
    "max_num_seqs",
    "chunk_tokens",
    "local_chunk_tokens",
)


def load(path: Path) -> Hardware:
    """The hardware that a JSON object describes; fields that it lacks keep their defaults.

    Raises ConfigError for a file that cannot be read or understood.
    """
    try:
        raw: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path}: {error}") from None
    known = {field.name for field in fields(Hardware)}
    if not isinstance(raw, dict) or raw.keys() - known:
        raise ConfigError(f"model {path}: expected an object of {', '.join(sorted(known))}")
    for name, value in raw.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"model {path}: {name} must be a number")
        if name in _COUNTS and value != int(value):
            raise ConfigError(f"model {path}: {name} must be a whole number")
    values: dict[str, Any] = {k: int(v) if k in _COUNTS else float(v) for k, v in raw.items()}
    return Hardware(**values)
