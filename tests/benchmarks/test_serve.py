"""The load client against a stub server whose times are known."""

import argparse
import asyncio
import json
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest

from benchmarks import load, serve, stats
from benchmarks.run import run
from deploy import cli
from tests.benchmarks.slow_server import slow_server


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(argv)


async def test_times_are_those_of_the_server() -> None:
    """Medians within 2 % of a TTFT of 200 ms and an ITL of 20 ms. The machine may be busy: what
    counts is when the server really wrote, and no single request."""
    async with slow_server(ttft_s=0.2, itl_s=0.02) as server:
        args = arguments(
            "--base-url", server.url, "--num-prompts", "9", "--random-output-len", "20",
            "--random-input-len", "8", "--max-concurrency", "3",
        )  # fmt: skip
        result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    assert [r.error for r in result.records] == [""] * 9
    for record in result.records:
        assert record.ttft_s >= 0.2
        assert len(record.itl_s) == 19
        assert record.output_len == 20
    summary = stats.summarize(result, {})
    ttfts = [times[1] - times[0] for times in server.sent]
    tpots = [(times[-1] - times[1]) / 19 for times in server.sent]
    assert summary["median_ttft_ms"] == pytest.approx(median(ttfts) * 1e3, rel=0.02)
    assert summary["median_tpot_ms"] == pytest.approx(median(tpots) * 1e3, rel=0.02)
    itls = [b - a for times in server.sent for a, b in pairwise(times[1:])]
    assert summary["mean_itl_ms"] == pytest.approx(mean(itls) * 1e3, rel=0.02)


async def test_rejections_are_misses() -> None:
    async with slow_server(ttft_s=0.0, itl_s=0.0) as server:
        server.reject = True
        args = arguments("--base-url", server.url, "--num-prompts", "5")
        result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    summary = stats.summarize(result, {"ttft": 1000.0})
    assert (summary["completed"], summary["errors"], summary["rejected"]) == (0, 0, 5)
    assert summary["request_goodput"] == 0.0
    assert summary["slo_attainment"] == 0.0


async def test_conversation_turns_continue_the_answer() -> None:
    async with slow_server(ttft_s=0.0, itl_s=0.0) as server:
        args = arguments(
            "--base-url", server.url, "--dataset-name", "conversation", "--num-prompts", "6",
            "--conversation-turns", "3", "--random-input-len", "4", "--random-output-len", "2",
        )  # fmt: skip
        plan = load.plan(args, 0)
        result = await run(serve.build_target(args), plan, progress=False)
    assert all(r.ok for r in result.records)
    for number, query in enumerate(plan.queries):
        if query.follows is None:
            continue
        before = plan.queries[query.follows]
        prompt = next(p for p in server.prompts if p[-4:] == query.tokens())
        assert prompt[-10:-4] == [*before.tokens(), 7, 8]
        assert result.records[number].sent >= result.records[query.follows].ended


async def test_dead_server_is_an_error_not_a_crash() -> None:
    args = arguments("--base-url", "http://127.0.0.1:9", "--num-prompts", "3")
    result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    assert all("ClientConnector" in r.error for r in result.records)
    summary = stats.summarize(result, {})
    assert summary["errors"] == 3
    assert summary["median_ttft_ms"] is None
    assert "TTFT                   -" in stats.table(summary)


async def test_warm_ups_do_not_warm_the_cache_for_the_run() -> None:
    async with slow_server(ttft_s=0.0, itl_s=0.0) as server:
        args = arguments(
            "--base-url", server.url, "--num-prompts", "4", "--num-warmups", "3",
            "--random-input-len", "6", "--random-output-len", "1", "--max-concurrency", "2",
        )  # fmt: skip
        result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    assert len(result.records) == 4
    assert len({tuple(prompt) for prompt in server.prompts}) == 7


async def test_a_closed_loop_is_due_when_its_turn_comes() -> None:
    async with slow_server(ttft_s=0.05, itl_s=0.0) as server:
        args = arguments(
            "--base-url", server.url, "--num-prompts", "6", "--max-concurrency", "2",
            "--random-output-len", "1",
        )  # fmt: skip
        result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    assert [r.held_s for r in result.records] == [0.0] * 6
    assert max(r.lag_s for r in result.records) < 0.05
    # Never more than two at once, and always two until the end.
    starts = sorted(r.sent for r in result.records)
    ends = sorted(r.ended for r in result.records)
    for i in range(2, 6):
        assert starts[i] >= ends[i - 2]
        assert starts[i] - ends[i - 2] < 0.03


async def test_a_request_that_was_held_back_misses_its_goal() -> None:
    async with slow_server(ttft_s=0.1, itl_s=0.0) as server:
        args = arguments(
            "--base-url", server.url, "--num-prompts", "4", "--max-concurrency", "1",
            "--request-rate", "1000", "--burstiness", "inf", "--random-output-len", "1",
        )  # fmt: skip
        result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    # All due at once, served one after the other: the fourth waited for 0.3 s.
    assert result.records[3].held_s == pytest.approx(0.3, abs=0.06)
    assert max(r.ttft_s for r in result.records) < 0.17
    summary = stats.summarize(result, {"ttft": 250.0})
    assert summary["slo_attainment"] == 0.5
    assert not summary["client_limited"]
    assert "held requests back" in stats.table(summary)


async def test_a_run_that_is_cut_tells_late_from_not_due() -> None:
    async with slow_server(ttft_s=5.0, itl_s=0.0) as server:
        args = arguments(
            "--base-url", server.url, "--num-prompts", "10", "--request-rate", "10", "--burstiness",
            "inf", "--max-seconds", "0.55",
        )  # fmt: skip
        result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    # The run starts 0.2 s before the first request: those of 0, 0.1, 0.2 and 0.3 s were sent.
    assert [r.error for r in result.records] == ["cut at the time limit"] * 4
    assert result.not_due == 6


@pytest.mark.parametrize(
    ("arguments_", "line"),
    [
        (["--burst-size", "2"], "--burst-size needs a finite --request-rate"),
        (["--request-rate", "0"], "rates and scales must be above 0"),
        (["--dataset-name", "trace"], "--dataset-name trace needs --dataset-path"),
        (["--slo", "ttfb:1s"], "bad SLO 'ttfb:1s': expected METRIC:TIME with METRIC one of "
                               "ttft, tpot, itl, e2el"),
        (["--header", "x"], "--header 'x' is not KEY=VALUE"),
        (["--json", "/no/such/dir/x"], "--json: no directory for /no/such/dir/x"),
    ],
)  # fmt: skip
def test_clashes_are_told_before_anything_is_sent(
    arguments_: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--base-url", "http://127.0.0.1:9", *arguments_]) == 2
    assert capsys.readouterr().err == f"tandem bench serve: error: {line}\n"


async def test_json_holds_summary_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    async with slow_server(ttft_s=0.01, itl_s=0.001) as server:
        argv = ["--base-url", server.url, "--num-prompts", "3", "--random-output-len", "4"]
        argv += ["--repeats", "2", "--api-key", "secret", "--no-progress"]
        argv += ["--json", str(path)]
        assert await asyncio.to_thread(serve.main, argv) == 0
    text = path.read_text()
    assert "secret" not in text
    result = json.loads(text)
    assert (result["completed"], result["total_output_tokens"], result["repeats"]) == (6, 24, 2)
    assert [len(records) for records in result["records"]] == [3, 3]
    assert len(result["records"][0][0]["itl_ms"]) == 3
    assert {"date", "commit", "machine", "versions", "arguments"} <= set(result)
    low, high = result["confidence_95"]["median_ttft_ms"]
    assert low <= result["median_ttft_ms"] <= high
    again = [*argv[:-7], "--no-progress", "--no-records", "--json", str(path)]
    async with slow_server(ttft_s=0.01, itl_s=0.001) as other:
        again[1] = other.url
        assert await asyncio.to_thread(serve.main, again) == 0
    short = json.loads(path.read_text())
    assert short["completed"] == 3 and "records" not in short
    # Prompts of another repeat, or of another run without --seed, are other prompts.
    assert len({tuple(prompt) for prompt in server.prompts}) == 6
    assert "completed requests" in capsys.readouterr().out


def test_the_command_knows_its_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sideways"]) == 2
    assert capsys.readouterr().err == "tandem bench: error: expected `tandem bench serve|sweep`\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "serve", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: tandem bench serve ")
