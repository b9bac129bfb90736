"""Curves over the request rate, from the points of a sweep: for its plots, tables and advice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import stats


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; without a spread to judge from, the interval is empty."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Sample:
    """All repeats of one contender at one rate. Times in milliseconds; shares of 1."""

    rate: float
    ttft: Estimate | None
    tpot: Estimate | None
    attainment: Estimate
    """Share of the requests that met every SLO; errors and rejections are misses."""
    goodput: Estimate
    """Requests per second that met them: rate times attainment, so that the time in which the last
    answers end does not count."""
    output_throughput: float
    failed: int
    client_limited: bool


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate that holds the SLOs for the wanted share of the requests."""

    rate: Estimate
    at_least: bool
    """The highest rate of the sweep still held them."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One contender over ascending rates."""

    name: str
    units: float
    prefill: int
    decode: int
    pinned: bool
    samples: tuple[Sample, ...]
    capacity: Capacity

    @property
    def is_tandem(self) -> bool:
        """Whether its P:D ratio can be advised."""
        return self.decode > 0

    @property
    def per_unit(self) -> Estimate:
        """Capacity of one core or GPU, in requests per second."""
        return self.capacity.rate.scaled(1 / self.units)


def over_repeats(values: Sequence[float | None]) -> Estimate | None:
    """Mean and Student's interval of what is there; None if nothing is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    # `intervals` has none of a single value.
    low, high = stats.intervals([{"x": float(v)} for v in found]).get("x", [mean, mean])
    return Estimate(mean, low, high)


def share(met: Sequence[float], count: int) -> Estimate:
    """A share of requests over repeats; of a single run, Wilson's interval over its `count`."""
    found = over_repeats(met)
    assert found is not None
    if len(met) == 1:
        z, p = 1.96, found.value
        middle = (p + z * z / (2 * count)) / (1 + z * z / count)
        root = math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
        half = z * root / (1 + z * z / count)
        found = Estimate(p, middle - half, middle + half)
    low, high = max(0.0, found.low), min(1.0, found.high)
    return Estimate(found.value, min(low, found.value), max(high, found.value))


def crossing(rates: Sequence[float], shares: Sequence[float], wanted: float) -> tuple[float, bool]:
    """The rate up to which the share is at least `wanted`, between points on a straight line, and
    whether it never fell below. Below the first rate the line comes from 100 % at rate 0."""
    rate, before = 0.0, 1.0
    for next_rate, value in zip(rates, shares, strict=True):
        if value < wanted:
            # At rate 0 nothing waits; a service that is too slow even alone holds no rate.
            if rate == 0.0:
                return 0.0, False
            return rate + (next_rate - rate) * (before - wanted) / (before - value), False
        rate, before = next_rate, value
    return rate, True


def build(document: Mapping[str, Any]) -> list[Curve]:
    """The curves of a sweep's document, in the order of its contenders; those without a point are
    left out."""
    result = []
    for contender in document["contenders"]:
        points = [p for p in document["points"] if p["contender"] == contender["name"]]
        if not points:
            continue
        rates = sorted({p["rate"] for p in points})
        samples = tuple(
            _sample(rate, [p["figures"] for p in points if p["rate"] == rate], document)
            for rate in rates
        )
        result.append(
            Curve(
                contender["name"], contender["units"], contender["prefill"], contender["decode"],
                contender["pinned"], samples, _capacity(points, document["attainment"]),
            )
        )  # fmt: skip
    return result


def _sample(
    rate: float, figures: Sequence[Mapping[str, Any]], document: Mapping[str, Any]
) -> Sample:
    q = document["percentile"]
    count = sum(f["completed"] + f["errors"] + f["rejected"] for f in figures)
    attainment = share([f["slo_attainment"] for f in figures], count)
    throughput = over_repeats([f["output_throughput"] for f in figures])
    assert throughput is not None
    return Sample(
        rate,
        over_repeats([f[f"{q}_ttft_ms"] for f in figures]),
        over_repeats([f[f"{q}_tpot_ms"] for f in figures]),
        attainment,
        attainment.scaled(rate),
        throughput.value,
        sum(f["errors"] + f["rejected"] for f in figures),
        any(f["client_limited"] for f in figures),
    )


def _capacity(points: Sequence[Mapping[str, Any]], wanted: float) -> Capacity:
    found = []
    for repeat in sorted({p["repeat"] for p in points}):
        rows = sorted((p["rate"], p) for p in points if p["repeat"] == repeat)
        shares = [p["figures"]["slo_attainment"] for _, p in rows]
        found.append(crossing([rate for rate, _ in rows], shares, wanted))
    rate = over_repeats([rate for rate, _ in found])
    assert rate is not None
    return Capacity(
        Estimate(rate.value, max(0.0, rate.low), rate.high), all(held for _, held in found)
    )
