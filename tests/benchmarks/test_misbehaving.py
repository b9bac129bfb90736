"""The benchmark of clients that misbehave, small: it measures, and nobody else is harmed."""

import argparse
from typing import Any

import pytest

from benchmarks.client import Record
from benchmarks.misbehaving import compare, itl_ms
from tests.client import http
from tests.conftest import MakeCheckpoint
from tests.system.serving import deployment, settled


def test_times_between_tokens() -> None:
    records = [Record(0.0, chunks=[1.0, 1.5, 1.75]), Record(0.0, chunks=[2.0])]
    assert itl_ms(records) == [500.0, 250.0]


@pytest.mark.system
async def test_a_small_crowd(checkpoint: MakeCheckpoint) -> None:
    with deployment(checkpoint("llama"), "--max-body-bytes", "1000000") as served:
        args = argparse.Namespace(
            url=served.url, streams=2, idle=100, slow=2, seconds=1.0, rounds=1,
            router_pid=served.pid("router"),
        )  # fmt: skip
        figures: dict[str, Any] = await compare(args)
        async with http(served.url) as client:
            # The streams that nobody read were cancelled: nothing is held.
            await settled(client, 60)
    assert figures["itl_ms_p99"].keys() == {"alone", "beside"}
    assert figures["crowd"]["idle"] == 100
    assert all(count >= 1 for count in figures["crowd"].values()), figures["crowd"]
    (before,), (beside,) = (figures["router_rss_mib"][name] for name in ("alone", "beside"))
    # Far less than what was sent: bodies of 50 MB are refused at their first byte.
    assert beside - before < 48
