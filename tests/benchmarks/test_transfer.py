"""The transfer benchmark, on blocks so small that it is over soon."""

from pathlib import Path

import pytest

from benchmarks import transfer
from benchmarks.transfer import Row
from benchmarks.transfer_peer import UCX_WAYS
from kvtransfer.ucx_transport import is_installed


async def test_every_way_gives_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer, "LAYOUTS", {"tiny": 4096})
    monkeypatch.setattr(transfer, "QUICK_BLOCKS", (3,))
    rows = [row async for row in transfer.measure(quick=True, venvs=tmp_path)]
    assert [(row.way, row.digest) for row in rows] == [
        ("memcpy", False),
        ("memcpy", True),
        ("digest", True),
        ("raw_tcp", False),
        ("shm", True),
        ("tcp", True),
        ("zmq", True),
        ("zmq_ipc", True),
        *((way, True) for way in UCX_WAYS if is_installed()),
    ]
    for row in rows:
        assert (row.layout, row.blocks, row.block_bytes) == ("tiny", 3, 4096)
        assert row.gbps > 0 and row.us_p50 > 0 and row.cpu_s_per_gb >= 0


def test_targets() -> None:
    def row(way: str, digest: bool, gbps: float) -> Row:
        return Row(way, "0.5B", 64, 196_608, digest, gbps, 1.0, 1.0)

    rows = [row("memcpy", False, 10.0), row("memcpy", True, 9.0), row("shm", True, 8.0)]
    assert transfer.ratios(rows) == ["shm / memcpy, at least 0.70: 0.5B/64 0.80: reached"]
    rows[-1] = row("shm", True, 6.0)
    missed = ["shm / memcpy, at least 0.70: 0.5B/64 0.60: missed at 0.5B/64"]
    assert transfer.ratios(rows) == missed
