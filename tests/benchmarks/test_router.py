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
        rows = asyncio.run(router.measure(targets[:3], 0, clients=2, count=4, turns=1))
        assert asyncio.run(router.memory(targets[1], count=8, parts=2))[0] > 0
    assert [row.requests >= 4 for row in rows] == [True] * 3
    assert rows[0].added_ms_p50 == 0
