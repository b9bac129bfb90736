"""Times on a GPU, and the two rates that every floor is made of. Used by `benchmarks.gpu`."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch

ROUNDS: Final = 15
COPY_BYTES: Final = 2 << 30
MATRIX: Final = 8192


@dataclass(frozen=True, slots=True)
class Machine:
    """The device and its measured rates."""

    name: str
    device: torch.device
    cache_bytes: int
    bytes_per_s: float
    """Of a large copy within the device, bytes read and bytes written."""
    flops_per_s: float
    """Of a large matrix product of random bfloat16 numbers."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def free(self) -> None:
        """Give memory that nobody uses back to the device, for another process."""
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement of one kernel."""

    kernel: str
    us: float
    floor_us: float
    bound: str
    """`memory` or `compute`: which floor is the larger one."""
    tb_per_s: float
    tflop_per_s: float
    rivals: dict[str, float | str]
    """Microseconds of others on the same problem, or why there are none."""

    @property
    def share(self) -> float:
        """Of the floor: 1 is perfect."""
        return self.floor_us / self.us


Call = Callable[[], object]


def median_s(calls: Sequence[Call], device: torch.device, rounds: int = ROUNDS) -> float:
    """Seconds of one call: the median of `rounds` rounds over all `calls`, which should each have
    operands of their own, together larger than the cache.

    On CUDA a round is one graph, timed with events, so that no launch on the host is in it.
    """
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - began) / len(calls))
        return statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    pairs = pairwise(events)
    median_ms = statistics.median(float(a.elapsed_time(b)) for a, b in pairs)
    return median_ms / 1e3 / len(calls)


def measure_machine(device: torch.device) -> Machine:
    """On a CPU the numbers mean nothing; they are there so that the same code runs."""
    cuda = device.type == "cuda"
    copy_bytes, size = (COPY_BYTES, MATRIX) if cuda else (1 << 20, 64)
    source = torch.randn(copy_bytes // 4, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    copy = median_s([lambda t=t: t.copy_(source) for t in targets], device)  # type: ignore[misc]
    del targets
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = median_s([lambda: a @ b], device)
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return Machine(
        name=properties.name if properties is not None else "CPU, interpreted",
        device=device,
        cache_bytes=properties.L2_cache_size if properties is not None else 0,
        bytes_per_s=2 * copy_bytes / copy,
        flops_per_s=2 * size**3 / product,
    )


def line(
    kernel: str,
    machine: Machine,
    seconds: float,
    num_bytes: float,
    flops: float,
    rivals: dict[str, float | str] | None = None,
) -> Line:
    memory, compute = num_bytes / machine.bytes_per_s, flops / machine.flops_per_s
    return Line(
        kernel=kernel,
        us=seconds * 1e6,
        floor_us=max(memory, compute) * 1e6,
        bound="memory" if memory > compute else "compute",
        tb_per_s=num_bytes / seconds / 1e12,
        tflop_per_s=flops / seconds / 1e12,
        rivals=rivals or {},
    )
