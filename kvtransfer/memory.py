"""The pool memory as transfers see it, and the digest of a block."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

from common.kv.shared import SharedBlocks


class BlockMemory(Protocol):
    """Blocks of equal size. `common.kv.pool.KvPool` is one; so is a bytearray in tests."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def shared(self) -> SharedBlocks | None:
        """The same blocks for peers on this machine, if they may be mapped."""
        ...

    def slab(self, block: int) -> memoryview:
        """Writable bytes of one block."""
        ...

    def run(self, block: int, count: int) -> memoryview:
        """Bytes of `count` consecutive blocks."""
        ...


def digest(slab: memoryview) -> int:
    """xxh3_64 of a block. It catches accidents; forgery is stopped by the ticket's secret."""
    return xxhash.xxh3_64_intdigest(slab)


def copy_block(source: memoryview, slab: memoryview) -> int:
    """Copy one block; returns the digest of the slab, read while it is still in the cache."""
    # numpy releases the GIL for the copy; a memoryview assignment would not.
    np.copyto(np.frombuffer(slab, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
    return digest(slab)


def copy_blocks(
    frames: Sequence[memoryview], slabs: Sequence[memoryview | None], block_bytes: int
) -> list[int | None]:
    """Copy the blocks in `frames` (one or more whole blocks each) to `slabs`, in order.

    None skips a block. Returns the digest of each slab as it was written (None where skipped).
    """
    digests: list[int | None] = []
    target = iter(slabs)
    for frame in frames:
        for start in range(0, len(frame), block_bytes):
            slab = next(target)
            if slab is None:
                digests.append(None)
            else:
                digests.append(copy_block(frame[start : start + block_bytes], slab))
    return digests
