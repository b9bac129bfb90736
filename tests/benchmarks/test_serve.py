"""The load client against a stub server whose times are known."""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import arrivals, datasets, serve, stats
from benchmarks.client import Record
from benchmarks.run import run
from tests.benchmarks.slow_server import slow_server


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(argv)


async def test_times_are_those_of_the_server() -> None:
    async with slow_server(ttft_s=0.2, itl_s=0.02) as server:
        args = arguments(
            "--base-url", server.url, "--num-prompts", "4", "--random-output-len", "20",
            "--random-input-len", "8", "--max-concurrency", "1",
        )  # fmt: skip
        result = await run(serve.build_target(args), serve.build_plan(args, 0), progress=False)
    assert [r.error for r in result.records] == [""] * 4
    for record, times in zip(result.records, server.sent, strict=True):
        arrived, *sent = times
        # The client's clock starts before the server sees the request and stops after it wrote.
        assert record.ttft_s >= sent[0] - arrived
        assert record.ttft_s == pytest.approx(sent[0] - arrived, rel=0.02, abs=0.01)
        real_tpot = (sent[-1] - sent[0]) / 19
        assert record.tpot_s == pytest.approx(real_tpot, rel=0.02, abs=0.001)
        assert len(record.itl_s) == 19
        assert record.output_len == 20


async def test_rejections_are_misses() -> None:
    async with slow_server(ttft_s=0.0, itl_s=0.0) as server:
        server.reject = True
        args = arguments("--base-url", server.url, "--num-prompts", "5")
        result = await run(serve.build_target(args), serve.build_plan(args, 0), progress=False)
    summary = stats.summarize(result.records, {"ttft": 1000.0}, result.cpu_share)
    assert (summary["completed"], summary["errors"], summary["rejected"]) == (0, 0, 5)
    assert summary["request_goodput"] == 0.0
    assert summary["slo_attainment"] == 0.0


async def test_conversation_turns_continue_the_answer() -> None:
    async with slow_server(ttft_s=0.0, itl_s=0.0) as server:
        args = arguments(
            "--base-url", server.url, "--dataset-name", "conversation", "--num-prompts", "6",
            "--conversation-turns", "3", "--random-input-len", "4", "--random-output-len", "2",
        )  # fmt: skip
        plan = serve.build_plan(args, 0)
        result = await run(serve.build_target(args), plan, progress=False)
    assert all(r.ok for r in result.records)
    for number, query in enumerate(plan.queries):
        if query.follows is None:
            continue
        before = plan.queries[query.follows]
        prompt = next(p for p in server.prompts if p[-4:] == list(query.tokens))
        assert prompt[-10:-4] == [*before.tokens, 7, 8]
        assert result.records[number].sent >= result.records[query.follows].ended


async def test_dead_server_is_an_error_not_a_crash() -> None:
    args = arguments("--base-url", "http://127.0.0.1:9", "--num-prompts", "3")
    result = await run(serve.build_target(args), serve.build_plan(args, 0), progress=False)
    assert all("ClientConnector" in r.error for r in result.records)
    summary = stats.summarize(result.records, {}, result.cpu_share)
    assert summary["errors"] == 3
    assert math.isnan(summary["median_ttft_ms"])


def test_poisson_and_fixed_rate() -> None:
    rng = np.random.default_rng(1)
    poisson = list(arrivals.rate_arrivals(20_000, 50.0, 1.0, rng))
    gaps = np.diff(poisson)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    fixed = list(arrivals.rate_arrivals(5, 50.0, math.inf, rng))
    assert fixed == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08])
    assert list(arrivals.burst_arrivals(5, 4.0, 2)) == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert list(arrivals.rate_arrivals(2, math.inf, 1.0, rng)) == [0.0, 0.0]


def test_trace_ticks_are_spread_in_order() -> None:
    rng = np.random.default_rng(0)
    due = arrivals.trace_arrivals([1000, 1000, 1000, 4000, 7000], 2.0, rng)
    assert due[0] == 0.0
    assert all(a <= b for a, b in pairwise(due))
    assert due[3] <= 1.5 < due[4] + 0.01


def test_trace_keeps_its_prefix_structure(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 1200, "output_length": 64, "hash_ids": [1, 2, 3]}\n'
        '{"timestamp": 5, "input_length": 1100, "output_length": 8, "hash_ids": [1, 2, 9]}\n'
    )
    first, second = datasets.trace_queries(path, 200, 0, length_scale=1 / 16)
    assert (len(first.tokens), len(second.tokens)) == (75, 69)
    assert first.tokens[:64] == second.tokens[:64]
    assert first.tokens[64:69] != second.tokens[64:69]
    assert (first.output_len, second.timestamp_ms) == (4, 5.0)
    path.write_text('{"timestamp": 0}\n')
    with pytest.raises(ValueError, match=r"trace.jsonl, line 1: KeyError"):
        list(datasets.trace_queries(path, 200, 0))


def test_slo_and_goodput() -> None:
    assert stats.parse_slo("ttft:0.5s,tpot:50ms") == {"ttft": 500.0, "tpot": 50.0}
    assert stats.parse_slo("ttft:500 e2el:2000") == {"ttft": 500.0, "e2el": 2000.0}
    with pytest.raises(ValueError, match="bad SLO 'ttfb:1s'"):
        stats.parse_slo("ttfb:1s")
    fast = Record(scheduled=0, sent=0, chunks=[0.1, 0.12, 0.14], ended=0.14, output_len=3)
    slow = Record(scheduled=0, sent=0, chunks=[0.1, 0.12, 0.30], ended=0.30, output_len=3)
    failed = Record(scheduled=0, sent=0, ended=1.0, error="HTTP 500", status=500)
    slo = {"ttft": 150.0, "tpot": 30.0}
    assert [stats.meets(r, slo) for r in (fast, slow, failed)] == [True, False, False]
    summary = stats.summarize([fast, slow, failed], slo, 0.1)
    assert summary["request_goodput"] == pytest.approx(1.0)
    assert summary["median_ttft_ms"] == pytest.approx(100.0)
    assert summary["p99_itl_ms"] == pytest.approx(175.2)


def test_intervals_over_repeats() -> None:
    runs = [{"x": 1.0, "n": 3}, {"x": 3.0, "n": 3}]
    low, high = stats.intervals(runs)["x"]
    assert (low, high) == pytest.approx((2 - 12.71, 2 + 12.71), rel=1e-3)
