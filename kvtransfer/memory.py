"""The pool memory as transfers see it, and the digest of a block."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

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


class Copied(Protocol):
    """Copies that were asked for together: a CUDA event behind them, where there is one."""

    def query(self) -> bool:
        """Whether they are over."""
        ...

    def synchronize(self) -> None:
        """Wait until they are. Called from any thread; other threads run meanwhile."""
        ...


@runtime_checkable
class StagedMemory(BlockMemory, Protocol):
    """Slots of host memory, which transports use like blocks, before blocks that they cannot
    reach: those of a GPU. `common.kv.stage.KvStage` is one."""

    @property
    def num_slots(self) -> int: ...

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> Copied:
        """Begin to copy (block, slot): blocks that were computed to slots."""
        ...

    def store(self, pairs: Sequence[tuple[int, int]]) -> Copied:
        """Begin to copy (slot, block): what came in to the blocks that were granted for it."""
        ...


def digest(block: memoryview) -> int:
    """xxh3_64 of a block. It catches accidents; forgery is stopped by the ticket's secret."""
    return xxhash.xxh3_64_intdigest(block)
