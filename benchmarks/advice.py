"""What a sweep advises: the best P:D ratio for the given SLOs, in sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.curves import Curve

ALIKE = 1.03
"""Capacities per core or GPU with a smaller ratio are told to be the same."""


@dataclass(frozen=True, slots=True)
class Advice:
    headline: str
    """Which ratio to take, or that none will do."""
    details: tuple[str, ...]
    best: str | None
    """Name of the curve that the headline recommends."""


def goals(slo: Mapping[str, float]) -> str:
    """`TTFT ≤ 500 ms and TPOT ≤ 50 ms`."""
    return " and ".join(f"{name.upper()} \u2264 {limit:g} ms" for name, limit in slo.items())


def number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or value >= 1000:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):.{max(0, digits)}f}"


def ratio_of(curve: Curve) -> str:
    """Its P:D ratio in words."""
    if curve.prefill == 0:
        return "no prefill pool: workers that do both"
    divisor = math.gcd(curve.prefill, curve.decode)
    return f"P:D = {curve.prefill // divisor}:{curve.decode // divisor}"


def advise(
    curves: Sequence[Curve], slo: Mapping[str, float], attainment: float, unit: str
) -> Advice:
    """The topology with the highest capacity per core or GPU, and how sure that is."""
    wanted = f"{goals(slo)} for {attainment:.0%} of the requests"
    ours = sorted((c for c in curves if c.is_tandem), key=lambda c: c.per_unit.value, reverse=True)
    rivals = sorted(
        (c for c in curves if not c.is_tandem), key=lambda c: c.per_unit.value, reverse=True
    )
    if not ours:
        return Advice("No topology of Tandem was measured: no P:D ratio to advise.",
                      _comparison(None, rivals, unit), None)  # fmt: skip
    best, *others = ours
    if best.capacity.rate.value == 0:
        headline = f"No topology holds {wanted}, not even at the lowest rate."
        return Advice(headline, ("Loosen the SLOs, or give it more or faster cores.",), None)
    more = "at least " if best.capacity.at_least else ""
    headline = (
        f"Best for {wanted}: {best.name} ({ratio_of(best)}), {more}"
        f"{number(best.capacity.rate.value)} requests/s, "
        f"{number(best.per_unit.value)} per {unit}."
    )
    details = []
    if best.capacity.at_least:
        details.append("Its limit was not reached: sweep higher rates to find it.")
    for other in others:
        details.append(_against(best, other))
    details += _comparison(best, rivals, unit)
    details.append(
        f"Each further {best.name} on {best.units:g} {unit}{'s' if best.units != 1 else ''} of "
        f"this kind adds about as much: for R requests/s take R / "
        f"{number(best.capacity.rate.value)} of them, and some to spare for bursts."
    )
    return Advice(headline, tuple(details), best.name)


def _against(best: Curve, other: Curve) -> str:
    if other.per_unit.value == 0:
        return f"{other.name} does not hold them at the lowest rate."
    share = best.per_unit.value / other.per_unit.value
    held = f"{number(other.capacity.rate.value)} requests/s"
    text = f"{best.name} holds {number(share)} times what {other.name} does ({held})"
    if best.capacity.at_least and other.capacity.at_least:
        return (
            f"{other.name} was not brought to its limit either: the sweep cannot tell them apart."
        )
    if share < ALIKE:
        return f"{other.name} holds about as much ({held})."
    if other.per_unit.high > best.per_unit.low and best.per_unit.low < best.per_unit.value:
        return text + ", but their 95 % intervals overlap: more repeats would tell."
    return text + "."


def _comparison(best: Curve | None, rivals: Sequence[Curve], unit: str) -> tuple[str, ...]:
    lines = []
    for rival in rivals:
        held = f"{number(rival.capacity.rate.value)} requests/s"
        line = f"{rival.name} holds {held}, {number(rival.per_unit.value)} per {unit}"
        if best is not None and rival.per_unit.value > 0:
            share = best.per_unit.value / rival.per_unit.value
            line += f", {best.name} {number(share)} times that"
        lines.append(f"{line}.")
    return tuple(lines)
