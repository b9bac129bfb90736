"""The benchmark of routers: its parts on a small scale."""

import asyncio

import pytest

from benchmarks import router


def test_index_row() -> None:
    row = router.measure_index(num_hashes=5_000, workers=8)
    assert (row["hashes"], row["workers"]) == (5_000, 8)
    assert 0 < row["lookup_us_p50"] <= row["lookup_us_p99"]


@pytest.mark.system
def test_every_router_that_is_there_streams_its_tokens() -> None:
    with router.Bench() as bench:
        targets = bench.targets(0)
        assert [target.name for target in targets[:3]] == ["direct", "tandem", "fastapi_httpx"]
        rows, ratios = asyncio.run(router.measure(targets[:3], 0, clients=2, count=4, turns=1))
        rss = asyncio.run(router.memory(targets[1], count=8))
        assert len(rss) == 2 and min(rss) > 0, "before and after"
    assert [row.requests >= 4 for row in rows] == [True] * 3
    assert rows[0].added_ms_p50 == 0
    assert [ratio.of for ratio in ratios] == ["fastapi_httpx / tandem"]


def test_cpu_is_divided_turn_by_turn() -> None:
    assert router.spread([3.0, 8.0, 10.0], [1.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
