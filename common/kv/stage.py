"""Host memory before a KV pool on a GPU: slots that transports can reach, and copies to and fro.

Made once at the start of a worker whose pool is in device memory. The engine never sees it. The
I/O thread copies between slots and blocks on two streams of its own (a GPU copies in both
directions at a time), beside what the engine computes; no stream waits for another:

- a block is offered only when the step that wrote it is over (`ModelRunner` waits for it), and
- a granted block is given back to the engine only when the copy into it is over (`Copied`).

With a pool on CPU the same copies are made at once: for tests, and to measure what they cost.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import torch

from common.errors import ConfigError
from common.kv.pool import KvPool
from common.kv.shared import SharedBlocks

log = logging.getLogger("tandem.worker")

MIN_SLOTS: Final = 32
"""Half of them in each direction; fewer would make blocks wait for each other."""


class Done:
    """The event behind copies that were made at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class KvStage:
    """Slots of one block each, in memory that peers on this machine can map and, for a GPU, that
    is pinned."""

    block_bytes: int
    num_slots: int
    shared: SharedBlocks

    def __init__(self, pool: KvPool, num_bytes: int) -> None:
        """`num_bytes`: of the slots, at least MIN_SLOTS of them. Raises ConfigError if there is no
        such memory."""
        self.block_bytes = pool.block_bytes
        self.num_slots = max(MIN_SLOTS, num_bytes // pool.block_bytes)
        try:
            self.shared = SharedBlocks(self.num_slots, self.block_bytes)
        except (AttributeError, OSError) as error:  # AttributeError: not on Linux
            raise ConfigError(f"no host memory for --stage-memory: {error}") from error
        # [slots or blocks, block_bytes] uint8 both.
        flat = torch.frombuffer(self.shared.blocks, dtype=torch.uint8)
        self._slots = flat.view(self.num_slots, self.block_bytes)
        self._blocks = pool.tensor.view(torch.uint8).view(pool.num_blocks, self.block_bytes)
        device = pool.tensor.device
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            new = torch.cuda.Stream
            self._streams = (new(device), new(device))  # type: ignore[no-untyped-call]
            with torch.cuda.device(device):  # another one would set up memory of its own
                _pin(flat, device)

    def slab(self, slot: int) -> memoryview:
        """Writable bytes of one slot."""
        return self.run(slot, 1)

    def run(self, slot: int, count: int) -> memoryview:
        """Writable bytes of `count` consecutive slots."""
        assert 0 <= slot and 0 < count <= self.num_slots - slot, (slot, count, self.num_slots)
        return self.shared.blocks[slot * self.block_bytes : (slot + count) * self.block_bytes]

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> "Done | torch.cuda.Event":
        """See `kvtransfer.memory.StagedMemory`."""
        return self._copy(pairs, self._blocks, self._slots, 0)

    def store(self, pairs: Sequence[tuple[int, int]]) -> "Done | torch.cuda.Event":
        return self._copy(pairs, self._slots, self._blocks, 1)

    def _copy(
        self, pairs: Sequence[tuple[int, int]], source: torch.Tensor, target: torch.Tensor, way: int
    ) -> "Done | torch.cuda.Event":
        if self._streams is None:
            # By this thread alone: torch would have all of its threads meet for each copy.
            there, here = target.numpy(), source.numpy()
            for start, at, count in runs(pairs):
                np.copyto(there[at : at + count], here[start : start + count])
            return Done()
        with torch.inference_mode(), torch.cuda.stream(self._streams[way]):
            for start, at, count in runs(pairs):
                target[at : at + count].copy_(source[start : start + count], non_blocking=True)
            # blocking: who waits for it leaves the core to others.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._streams[way])
            return event


def runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(source, target, count) of neighbours on both sides, so that they are one copy."""
    start = at = count = 0
    for source, target in pairs:
        if count and (source, target) == (start + count, at + count):
            count += 1
            continue
        if count:
            yield start, at, count
        start, at, count = source, target, 1
    if count:
        yield start, at, count


def _pin(memory: torch.Tensor, device: torch.device) -> None:
    """Let the GPU, which is the current one, read and write it directly, for the life of the
    process. Without that copies are right, but slower and not beside the compute."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if error != 0:
        log.warning("host memory cannot be pinned (CUDA error %d): copies are slower", error)
        # CUDA shows the error again to whoever launches the next kernel: here nobody minds.
        with suppress(RuntimeError):
            torch.ones(1, device=device)
