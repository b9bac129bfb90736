"""`tandem doctor` on this machine, on what is wrong with it, and on a deployment that runs."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.ucx_transport import is_installed
from tests.client import http
from tests.conftest import MakeCheckpoint
from tests.redis_server import RedisServer
from tests.system.serving import complete_all, deployment

ROOT = Path(__file__).parents[2]


def doctor(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "doctor", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=200,
    )


def findings(result: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    """By name."""
    assert result.stderr == "", result.stderr
    report = json.loads(result.stdout)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["name"], []).append(finding)
    failed = [f for group in found.values() for f in group if f["state"] == "FAILED"]
    assert report["failed"] == len(failed) and result.returncode == (1 if failed else 0)
    return found


def test_a_machine_that_is_fit() -> None:
    found = findings(doctor("--port", "0", "--json"))
    names = {"python", "torch", "cpu", "gpu", "compiler", "backend", "memory", "shared"}
    names |= {"huge pages", "router port", "worker port", "over shm", "over tcp", "over zmq"}
    names |= {"redis", "over ucx" if is_installed() else "ucx"}
    assert names <= found.keys()
    for name in ("over shm", "over tcp", "over zmq"):
        assert found[name][0]["state"] == "ok" and "GB/s" in found[name][0]["detail"]
    assert not any(f["state"] == "FAILED" for group in found.values() for f in group)


def test_each_failure_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        flags = ("--port", str(port), "--redis", "redis://:secret@127.0.0.1:1/0")
        result = doctor(*flags)
        assert (result.returncode, result.stderr) == (1, "")
        failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
        assert [line.split()[1] for line in failed] == ["router", "redis"]
        assert f"port {port} of 127.0.0.1 is in use" in failed[0]
        assert failed[0].endswith("; give another --port")
        assert "no Redis answers at redis://:***@127.0.0.1:1/0" in failed[1]
        assert failed[1].endswith("; start it, or correct --redis")
        assert result.stdout.splitlines()[-1].startswith("2 of ")


def test_wrong_flags() -> None:
    result = doctor("--transport", "pigeon")
    assert result.returncode == 2 and result.stderr.startswith("tandem doctor: error: --transport")


@pytest.mark.redis
def test_a_namespace_without_workers(redis_server: RedisServer) -> None:
    found = findings(doctor("--port", "0", "--json", "--redis", redis_server.url))
    assert found["redis"][0]["state"] == "ok"
    assert found["workers"][0]["detail"] == "none in namespace 'default'"


@pytest.mark.redis
@pytest.mark.system
async def test_a_deployment_that_runs(
    checkpoint: MakeCheckpoint, redis_server: RedisServer
) -> None:
    model = checkpoint("llama")
    with deployment(model, "--redis", redis_server.url) as served:
        async with http(served.url) as client:
            await complete_all(client, [list(range(3, 90))], 1, max_tokens=4)
        found = findings(doctor("--port", "0", "--json", "--redis", redis_server.url))
    details = {f["detail"].split("(")[1].split(")")[0]: f["detail"] for f in found["worker"]}
    assert {finding["state"] for finding in found["worker"]} == {"ok"}
    assert "sends over shm to 1" in details["prefill"]
    assert "GB/s over shm" in details["decode"]
    (pair,) = found["pair"]
    assert pair["state"] == "ok", pair
    assert pair["detail"].endswith(": shm or tcp or zmq from here")
