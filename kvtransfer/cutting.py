"""How blocks of one size are made of blocks of another: by the units of 16 tokens of both.

A block is `rows` rows (layer, k|v, head), each with the tokens of the block one after the other;
so a unit is not one piece of memory, but a piece of every row. The sender cuts its blocks to the
receiver's size, where the bytes leave the pool: in its own process, or in the receiver's, which
maps the pool (shm). Used by `Outgoing`, `copying` and the shm transport.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from common.blockhash import UNIT
from common.errors import ProtocolError
from common.messages import KvLayoutInfo
from kvtransfer.protocol import RUN_BLOCKS, Wire


class Piece(NamedTuple):
    """16 tokens of a block of the sender's pool."""

    block: int
    """-1: zeros."""
    unit: int


@dataclass(frozen=True, slots=True)
class Cutting:
    """Blocks of `units` units become blocks of `pieces` units."""

    rows: int
    units: int
    pieces: int
    source_bytes: int
    """Of a block that is cut."""

    @classmethod
    def of(cls, layout: KvLayoutInfo, block_bytes: int, wire: Wire) -> "Cutting":
        """From the sender's layout, whose blocks have `block_bytes`, to what the receiver takes.
        Raises ProtocolError if that cannot be cut from it."""
        own = Wire.of(layout)
        if (wire.first_head, wire.num_heads, wire.dtype) != (
            own.first_head, own.num_heads, own.dtype,
        ):  # fmt: skip
            raise ProtocolError(f"{wire} cannot be cut out of {own}")
        for size in (own.block_size, wire.block_size):
            if not UNIT <= size <= RUN_BLOCKS * UNIT or size % UNIT:
                raise ProtocolError(f"{wire} of {own}: no multiples of {UNIT} tokens")
        rows = layout.num_layers * 2 * layout.num_kv_heads
        units, pieces = own.block_size // UNIT, wire.block_size // UNIT
        if units != pieces and block_bytes % (rows * units):
            raise ProtocolError(f"blocks of {block_bytes} bytes in {rows} rows cannot be cut")
        return cls(rows, units, pieces, block_bytes)

    @property
    def is_whole(self) -> bool:
        """Nothing is cut: the sizes are equal."""
        return self.units == self.pieces

    @property
    def piece_bytes(self) -> int:
        """Of one unit in one row."""
        return self.source_bytes // (self.rows * self.units)

    @property
    def stride(self) -> int:
        """Bytes from one row of a source block to the next."""
        return self.source_bytes // self.rows

    @property
    def block_bytes(self) -> int:
        """Of a block that is made."""
        return self.source_bytes * self.pieces // self.units

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of the receiver that hold so many tokens."""
        return -(-num_tokens // (self.pieces * UNIT))

    def fill(self, position: int, num_tokens: int) -> int:
        """Tokens in the receiver's block at `position`."""
        size = self.pieces * UNIT
        return min(size, num_tokens - position * size)

    def sources(self, position: int, num_tokens: int) -> list[tuple[int, int]]:
        """(position, unit) among the sender's blocks of each unit of the receiver's block at
        `position`, as far as the prompt goes; of the whole block if nothing is cut."""
        if self.is_whole:
            return [(position, 0)]
        start = position * self.pieces
        end = min(start + self.pieces, -(-num_tokens // UNIT))
        return [divmod(unit, self.units) for unit in range(start, end)]

    def touched(self, positions: Iterable[int]) -> set[int]:
        """The receiver's blocks that have a part of the sender's blocks at `positions`."""
        if self.is_whole:
            return set(positions)
        return {
            unit // self.pieces
            for position in positions
            for unit in range(position * self.units, (position + 1) * self.units)
        }
