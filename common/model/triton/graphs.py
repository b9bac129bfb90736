"""CUDA graphs of plain decode steps, one per batch bucket, and the pinned memory before them.

A decode step of a small batch is some hundred short kernels: launched one by one they cost more
than they compute. A graph is captured at the first step of its bucket, which itself runs eagerly
(and so compiles what is not compiled yet). Owned by `common.model.triton.decoder`.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from common.model.batch import Row
from common.model.triton.inputs import Numbers, Step, pack
from common.model.triton.sampling import best_tokens

BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a graph; a step takes the next larger one, and larger batches none."""
TABLE_FACTOR: Final = 4
"""Entries of all block tables of a step, in blocks of the pool: more than 1 as rows may share."""


class HostBuffers:
    """Two pinned buffers in turn: one may be filled while the other is still being copied."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [self._new(1 << 16), self._new(1 << 16)]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()] if self._cuda else []
        self._turn = 0

    def copy(self, numbers: Numbers, target: torch.Tensor) -> None:
        """Enqueue a copy of `numbers` to the beginning of `target` on the current stream."""
        count = len(numbers)
        if not self._cuda:
            target[:count].copy_(torch.from_numpy(numbers))
            return
        turn = self._turn = 1 - self._turn
        self._copied[turn].synchronize()
        if len(self._buffers[turn]) < count:
            self._buffers[turn] = self._new(2 * count)
        buffer = self._buffers[turn][:count]
        buffer.numpy()[:] = numbers
        target[:count].copy_(buffer, non_blocking=True)
        self._copied[turn].record()

    def _new(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, pin_memory=self._cuda)


class _Graph:
    """One captured bucket and the memory that it reads and writes."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        self.inputs = torch.zeros(numbers, dtype=torch.int32, device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.best: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None


class DecodeGraphs:
    """The graphs of one decoder."""

    def __init__(self, host: HostBuffers, num_blocks: int) -> None:
        self._host = host
        self._max_table = TABLE_FACTOR * num_blocks
        self._graphs: dict[int, _Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(
        self,
        rows: Sequence[Row],
        block_size: int,
        max_parts: int,
        forward: Callable[[Step], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Best tokens [bucket] and logits [bucket, vocab] of a step of decode rows; lines past
        the rows mean nothing. They are overwritten by the next step of the same bucket. None if
        no graph can take this step."""
        bucket = next((size for size in BUCKETS if size >= len(rows)), None)
        if bucket is None or sum(len(row.blocks) for row in rows) > self._max_table:
            return None
        packed = pack(rows, [], block_size, 1, bucket=bucket)
        if packed.num_parts > max_parts:
            return None
        graph = self._graphs.get(bucket)
        if graph is not None and graph.best is not None and graph.logits is not None:
            self._host.copy(packed.numbers, graph.inputs)
            graph.graph.replay()
            return graph.best, graph.logits
        device = torch.device("cuda", torch.cuda.current_device())
        graph = _Graph(sum(packed.sizes[:-1]) + self._max_table, device)
        self._host.copy(packed.numbers, graph.inputs)
        step = Step.of(graph.inputs, packed)
        logits = forward(step)
        result = best_tokens(logits), logits
        # What the capture allocates is new memory: the results of this eager step stay as they are.
        # Only this thread is bound by the rules of a capture: another one copies KV blocks.
        mode = "thread_local"
        with torch.cuda.graph(graph.graph, pool=self._memory, capture_error_mode=mode):
            graph.logits = forward(step)
            graph.best = best_tokens(graph.logits)
        self._graphs[bucket] = graph
        return result
