"""`tandem up` as a whole: real processes, from the first line to nothing being left."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from common import random_model
from deploy.redis_server import RedisServer, answers
from tests.deployment import Deployment

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    random_model.write(directory)
    return directory


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
        server = RedisServer(Path(directory))
        with subprocess.Popen(server.argv, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 20
            while not answers(server.url):
                assert time.monotonic() < deadline, "Redis did not start"
                time.sleep(0.02)
            yield server.url
            process.terminate()


def complete(url: str, max_tokens: int = 8) -> list[int]:
    """Token ids of a greedy completion."""
    body: dict[str, Any] = {"prompt": "Hello, world. " * 4, "max_tokens": max_tokens}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    assert len(tokens) == max_tokens
    return tokens


def test_serves_restarts_a_killed_worker_and_drains(model: Path) -> None:
    flags = ("--model", str(model), "--served-model-name", "tiny", "--dtype", "float32")
    with Deployment(*flags) as deployment:
        health = httpx.get(f"{deployment.url}/health")
        assert health.status_code == 200
        assert health.json()["workers"] == {"prefill": 1, "decode": 1}
        (served,) = httpx.get(f"{deployment.url}/v1/models").json()["data"]
        assert served["id"] == "tiny"
        tokens = complete(deployment.url)
        for name in ("router", "prefill-0", "decode-0"):
            since = len(deployment.lines)
            os.kill(deployment.pid(name), signal.SIGKILL)
            deployment.wait_for(rf"^{name} +exited +by SIGKILL$", since)
            deployment.wait_for(rf"^{name} +ready ", since)
        deadline = time.monotonic() + 20
        while httpx.get(f"{deployment.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert complete(deployment.url) == tokens
        deployment.stop_group()


def test_two_at_once_one_killed_one_interrupted(model: Path) -> None:
    flags = ("--model", str(model), "--prefill", "0", "--dtype", "float32")
    first, second = Deployment(*flags), Deployment(*flags, "--log-format", "json")
    first.launch()
    second.start()
    first.wait_for("^Serving ")
    assert complete(first.url) == complete(second.url)
    first.kill()
    assert complete(second.url)
    records = [json.loads(line) for line in second.lines if line.startswith("{")]
    assert {"redis", "router", "decode-0"} == {
        record["child"] for record in records if record["event"] == "ready"
    }
    second.stop(signal.SIGINT)


def test_given_redis_and_a_second_signal(model: Path, redis_url: str) -> None:
    flags = ("--model", str(model), "--prefill", "0", "--redis", redis_url, "--namespace", "up")
    with Deployment(*flags) as deployment:
        with redis.Redis.from_url(redis_url) as client:
            assert len(client.keys("tandem:up:worker:*")) == 1
        body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        url = f"{deployment.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            since = len(deployment.lines)
            deployment.process.send_signal(signal.SIGINT)
            deployment.wait_for("^router +draining$", since)
            started = time.monotonic()
            deployment.stop(signal.SIGINT)
            assert time.monotonic() - started < 5


def test_pinned_workers_that_leave_a_given_redis(model: Path, redis_url: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    flags = ("--model", str(model), "--pin-cores", "--redis", redis_url, "--namespace", "left")
    with Deployment(*flags) as deployment:
        cores = [
            set(psutil.Process(deployment.pid(name)).cpu_affinity())
            for name in ("prefill-0", "decode-0")
        ]
        assert cores[0] and cores[1] and not cores[0] & cores[1]
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("tandem:left:worker:*") == []


def test_a_corrupt_checkpoint_is_one_line(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            data[: len(data) // 2] if file.suffix == ".safetensors" else data
        )
    deployment = Deployment("--model", str(tmp_path), "--prefill", "0")
    deployment.launch()
    deployment.wait(1)
    errors = [line for line in deployment.lines if "error" in line]
    assert errors == [deployment.lines[-1]]
    assert errors[0].startswith("tandem up: error: decode-0: ")
    assert "model.safetensors" in errors[0]
    assert not any("Traceback" in line for line in deployment.lines)


def test_a_port_in_use_is_one_line_at_once(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        deployment = Deployment("--model", str(model), "--port", str(port))
        deployment.launch()
        deployment.wait(1)
    assert deployment.lines == [
        f"tandem up: error: port {port} of 127.0.0.1 is in use; choose another --port"
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_it_loads(number: signal.Signals) -> None:
    deployment = Deployment("--prefill", "1")
    deployment.launch()
    deployment.wait_for("^decode-0 +loading ")
    deployment.stop(number)
