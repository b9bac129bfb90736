"""The pool memory as transfers see it, and the digest of a block."""

from typing import Protocol

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


def digest(block: memoryview) -> int:
    """xxh3_64 of a block. It catches accidents; forgery is stopped by the ticket's secret."""
    return xxhash.xxh3_64_intdigest(block)
