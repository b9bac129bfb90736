"""The paged KV layout: `[num_blocks, layer, k|v, kv_head, slot, head_dim]`.

A block of all layers is one contiguous slab, so that shipping a block gathers nothing. Sender
and receiver compare `KvLayout.info()` when they meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.blockhash import UNIT
from common.errors import ConfigError

if TYPE_CHECKING:
    from common.messages import KvLayoutInfo

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape and dtype of one block. Raises ConfigError for a block size that is no multiple
    of the hash unit or an unknown dtype."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        if self.block_size < UNIT or self.block_size % UNIT:
            raise ConfigError(f"block size {self.block_size} is not a multiple of {UNIT}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"KV dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`[layer, k|v, kv_head, slot, head_dim]`."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        n = DTYPE_BYTES[self.dtype]
        for size in self.block_shape:
            n *= size
        return n

    @property
    def units_per_block(self) -> int:
        return self.block_size // UNIT

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def info(self) -> KvLayoutInfo:
        # Here: a pool can be made and read where msgspec is not installed.
        from common.messages import KvLayoutInfo

        return KvLayoutInfo(
            block_size=self.block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )
