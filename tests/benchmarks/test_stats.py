"""Summaries: goals, percentiles, repeats."""

from typing import Any

import pytest

from benchmarks import stats
from benchmarks.client import Record
from benchmarks.run import Run


def test_slo_and_goodput() -> None:
    assert stats.parse_slo("ttft:0.5s,tpot:50ms") == {"ttft": 500.0, "tpot": 50.0}
    assert stats.parse_slo("ttft:500 e2el:2000") == {"ttft": 500.0, "e2el": 2000.0}
    with pytest.raises(ValueError, match="bad SLO 'ttfb:1s'"):
        stats.parse_slo("ttfb:1s")
    fast = Record(due=0, chunks=[0.1, 0.12, 0.14], ended=0.14, output_len=3)
    slow = Record(due=0, chunks=[0.1, 0.12, 0.30], ended=0.30, output_len=3)
    failed = Record(due=0, ended=1.0, error="HTTP 500", status=500)
    slo = {"ttft": 150.0, "tpot": 30.0}
    assert [stats.meets(r, slo) for r in (fast, slow, failed)] == [True, False, False]
    summary = stats.summarize(Run([fast, slow, failed], 0.1), slo)
    assert summary["request_goodput"] == pytest.approx(1.0)
    assert summary["median_ttft_ms"] == pytest.approx(100.0)
    assert summary["p99_itl_ms"] == pytest.approx(175.2)


def test_intervals_over_repeats() -> None:
    runs = [{"x": 1.0, "n": 3}, {"x": 3.0, "n": 3}]
    low, high = stats.intervals(runs)["x"]
    assert (low, high) == pytest.approx((2 - 12.71, 2 + 12.71), rel=1e-3)


def test_repeats_are_summed_and_averaged() -> None:
    runs: list[dict[str, Any]] = [
        {"n": 3, "x": 1.0, "flag": False, "y": None},
        {"n": 4, "x": 3.0, "flag": True, "y": 5.0},
    ]
    summary = stats.combine(runs)
    assert (summary["n"], summary["x"], summary["flag"], summary["y"]) == (7, 2.0, True, 5.0)
    assert set(summary["confidence_95"]) == {"x"}
    assert stats.combine(runs[:1]) == runs[0]
