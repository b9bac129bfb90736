"""When requests are sent: offsets in seconds from the start of a run."""

import math
from collections.abc import Iterator, Sequence

import numpy as np


def rate_arrivals(
    count: int, rate: float, burstiness: float, rng: np.random.Generator
) -> Iterator[float]:
    """Offsets of `count` requests at `rate` per second; infinite: all at once.

    Gaps follow a gamma distribution with shape `burstiness` and mean `1 / rate`: 1 is a Poisson
    process, below 1 is burstier, infinite is a fixed rate.
    """
    if math.isinf(rate):
        yield from [0.0] * count
        return
    now = 0.0
    for _ in range(count):
        yield now
        if math.isinf(burstiness):
            now += 1.0 / rate
        else:
            now += float(rng.gamma(burstiness, 1.0 / (rate * burstiness)))


def burst_arrivals(count: int, rate: float, size: int) -> Iterator[float]:
    """Offsets in bursts of `size` requests at once, `rate` requests per second on average."""
    for i in range(count):
        yield (i // size) * size / rate


def trace_arrivals(
    timestamps_ms: Sequence[float], scale: float, rng: np.random.Generator
) -> list[float]:
    """Recorded arrival times, ascending, as offsets, `scale` times as fast.

    Requests that share a timestamp were quantised by whoever recorded them: they are spread
    uniformly up to the next distinct timestamp, those of the last one over the interval before it.
    The order of the trace is kept.
    """
    times = np.asarray(timestamps_ms, dtype=np.float64)
    if times.size == 0:
        return []
    ticks, counts = np.unique(times, return_counts=True)
    gaps = np.diff(ticks)
    widths = np.append(gaps, gaps[-1] if gaps.size else 0.0)
    spread: list[float] = []
    for tick, width, count in zip(ticks, widths, counts, strict=True):
        offsets = np.sort(rng.uniform(0.0, width, count)) if count > 1 else np.zeros(1)
        spread.extend((tick + offsets).tolist())
    start = spread[0]
    return [(t - start) / 1000.0 / scale for t in spread]
