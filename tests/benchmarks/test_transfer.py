"""The transfer benchmark, on blocks so small that it is over soon."""

import pytest

from benchmarks import transfer


def test_every_way_gives_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LAYOUTS", {"tiny": 4096})
    monkeypatch.setattr(transfer, "QUICK_BLOCKS", (3,))
    rows = list(transfer.measure(quick=True))
    assert [(row.way, row.digest) for row in rows] == [
        ("memcpy", False),
        ("memcpy", True),
        ("raw_tcp", False),
        ("shm", True),
        ("tcp", True),
        ("zmq", True),
    ]
    for row in rows:
        assert (row.layout, row.blocks, row.block_bytes) == ("tiny", 3, 4096)
        assert row.gbps > 0 and row.us_p50 > 0 and row.cpu_s_per_gb >= 0
