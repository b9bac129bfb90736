"""Loads of a comparison against servers whose times are known."""

import pytest

from benchmarks.client import Record, Target
from benchmarks.compare import mix
from benchmarks.compare.loads import LOADS, TPOT, TTFT, Closed, chosen, measure
from benchmarks.compare.mix import Mix
from tests.benchmarks.slow_server import slow_server


def target(url: str) -> Target:
    return Target(f"{url}/v1/completions", None, {"content-type": "application/json"}, {}, 30.0)


async def test_closed_load_measures_after_warm_ups() -> None:
    load = Closed("x", 2, 4, 16, 5, (TPOT, TTFT))
    async with slow_server(ttft_s=0.1, itl_s=0.02) as server:
        figures = await measure(load, target(server.url), 200, (0,))
    assert len(server.prompts) == 6
    assert [len(prompt) for prompt in server.prompts] == [16] * 6
    assert figures["median_ttft_ms"] == pytest.approx(100, rel=0.4)
    assert figures["median_tpot_ms"] == pytest.approx(20, rel=0.3)


async def test_a_server_that_drops_requests_is_not_measured() -> None:
    load = Closed("x", 1, 2, 16, 5, (TPOT,))
    async with slow_server(ttft_s=0.0, itl_s=0.0) as server:
        server.reject = True
        with pytest.raises(ConnectionError, match="HTTP 429"):
            await measure(load, target(server.url), 200, (0,))


async def test_mix_keeps_streams_running_beside_prompts() -> None:
    load = Mix(
        "mix", streams=2, input_len=8, output_len=10, prompt_len=32, prompt_output_len=1,
        every_s=0.4, seconds=1.5, columns=(TTFT,),
    )  # fmt: skip
    async with slow_server(ttft_s=0.02, itl_s=0.02) as server:
        figures = await mix.run_mix(load, target(server.url), 200, (0,))
    # 7 streams of 0.2 s in 1.5 s, twice; prompts at 0.2, 0.6, 1.0 and 1.4 s, and one to warm up.
    assert sum(len(prompt) == 32 for prompt in server.prompts) == 5
    assert figures["prompts"] == 4
    assert 4 <= sum(len(prompt) == 8 for prompt in server.prompts) <= 16
    assert 20 <= figures["median_ttft_ms"] < 80
    assert figures["median_itl_ms"] == pytest.approx(20, rel=0.3)


def test_what_is_unfinished_counts_with_its_wait() -> None:
    stalled = Record(due=0.0, sent=0.0, chunks=[0.5, 1.0])
    waiting = Record(due=4.0, released=4.0, sent=4.0)
    figures = mix.figures([stalled], [waiting], 0.0, 10.0)
    assert figures["p99_itl_ms"] == pytest.approx(9000, rel=0.02)
    assert figures["median_ttft_ms"] == 6000.0
    assert figures["decode_throughput"] == 0.2
    assert mix.figures([], [], 0.0, 1.0)["p99_itl_ms"] == 1000.0


def test_short_loads_keep_their_kind() -> None:
    assert {load.shortened().name for load in LOADS} == {load.name for load in LOADS}
    with pytest.raises(ValueError, match="no load 'c2'; there are c1, "):
        chosen(["c1", "c2"])
    assert [load.name for load in chosen(["mix", "c1"])] == ["c1", "mix"]
