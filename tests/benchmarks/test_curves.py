"""From points to curves: capacities, intervals, and what is advised."""

from typing import Any

import pytest

from benchmarks import curves
from benchmarks.advice import advise, number
from tests.benchmarks.sweep_document import document


def test_crossing_is_between_points() -> None:
    rate, held = curves.crossing([1, 2, 4], [1.0, 1.0, 0.8], 0.9)
    assert rate == pytest.approx(3.0) and not held
    assert curves.crossing([1, 2], [1.0, 0.95], 0.9) == (2, True)
    # What recovers later does not count: it had failed before.
    assert curves.crossing([1, 2, 3], [1.0, 0.0, 1.0], 0.9)[0] == pytest.approx(1.1)
    assert curves.crossing([1, 2], [0.5, 0.2], 0.9) == (0.0, False)


def test_intervals_over_repeats_and_of_one_run() -> None:
    assert curves.over_repeats([None, None]) is None
    assert curves.over_repeats([3.0]) == curves.Estimate(3.0, 3.0, 3.0)
    found = curves.over_repeats([1.0, None, 3.0])
    assert found is not None and found.value == 2.0
    assert found.low == pytest.approx(2 - 12.71, 1e-3)
    # Wilson's interval of 18 of 20.
    one = curves.share([0.9], 20)
    assert (one.value, one.low, one.high) == pytest.approx((0.9, 0.699, 0.972), abs=1e-3)
    all_of_them = curves.share([1.0], 20)
    assert (all_of_them.low, all_of_them.high) == pytest.approx((0.839, 1.0), abs=1e-3)
    assert curves.share([1.0, 1.0, 0.9], 20).high == 1.0


def test_curves_of_a_document() -> None:
    colocated, split, rival = curves.build(document())
    assert [s.rate for s in colocated.samples] == [1.0, 2.0, 4.0]
    assert colocated.capacity.rate.value == pytest.approx(2.0 + 2 * 0.1 / 0.6)
    assert colocated.per_unit.value == pytest.approx(colocated.capacity.rate.value / 2)
    assert split.capacity.at_least and split.capacity.rate.value == 4.0
    assert split.samples[2].goodput.value == pytest.approx(4 * 0.95)
    assert split.samples[0].ttft is not None and split.samples[0].ttft.value == 60.0
    assert rival.samples[2].failed == 2 * 5
    assert not rival.is_tandem


def test_the_best_ratio_is_advised() -> None:
    found = document()
    advice = advise(curves.build(found), found["slo"], found["attainment"], "core")
    assert advice.best == "1P1D"
    assert advice.headline == (
        "Best for TTFT \u2264 500 ms and TPOT \u2264 50 ms for 90% of the requests: "
        "1P1D (P:D = 1:1), at least 4.00 requests/s, 2.00 per core."
    )
    assert advice.details[:3] == (
        "Its limit was not reached: sweep higher rates to find it.",
        "1P1D holds 1.71 times what colocated does (2.33 requests/s).",
        "old holds 1.17 requests/s, 0.583 per core, 1P1D 3.43 times that.",
    )


def test_what_holds_as_much_is_not_told_to_be_worse() -> None:
    found = document()
    for point in found["points"]:
        share = 0.5 if point["rate"] == 4.0 else 1.0
        if point["contender"] == "1P1D" and point["rate"] == 4.0:
            share = 0.49
        point["figures"]["slo_attainment"] = share
    advice = advise(curves.build(found), found["slo"], found["attainment"], "core")
    assert (advice.best, advice.details[0]) == (
        "colocated", "1P1D holds about as much (2.39 requests/s).",
    )  # fmt: skip


def test_nothing_is_advised_where_nothing_holds() -> None:
    found = document()
    points: list[dict[str, Any]] = found["points"]
    for point in points:
        point["figures"]["slo_attainment"] = 0.1
    advice = advise(curves.build(found), found["slo"], found["attainment"], "core")
    assert advice.best is None
    assert advice.headline.startswith("No topology holds TTFT \u2264 500 ms")
    rivals = [c for c in curves.build(found) if not c.is_tandem]
    assert advise(rivals, found["slo"], 0.9, "core").headline.startswith("No topology of Tandem")


def test_numbers_have_three_digits() -> None:
    shown = [number(v) for v in (0, 0.1234, 1.0, 23.456, 456.7, 12345.6)]
    assert shown == ["0", "0.123", "1.00", "23.5", "457", "12,346"]
