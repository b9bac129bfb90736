"""Configurations that are refused."""

import pytest

from common.config import RouterConfig, UpConfig, WorkerConfig, is_loopback
from common.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert RouterConfig(host=host).api_key is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.3", "gpu-7.example"])
def test_other_machines_need_a_key_or_a_decision(host: str) -> None:
    assert not is_loopback(host)
    for kind in (RouterConfig, UpConfig):
        with pytest.raises(ConfigError, match="--api-key"):
            kind(host=host)
        assert kind(host=host, api_key="secret").host == host
        assert kind(host=host, insecure=True).host == host
    with pytest.raises(ConfigError, match="--insecure"):
        WorkerConfig(worker_host=host)
    assert WorkerConfig(worker_host=host, insecure=True).worker_host == host


@pytest.mark.parametrize("key", ["", " ", "\t", " key", "key\n"])
def test_a_blank_key_is_no_authentication(key: str) -> None:
    for kind in (RouterConfig, UpConfig):
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ConfigError, match="--api-key must not be empty"):
                kind(host=host, api_key=key)


def test_threads() -> None:
    for kind in (WorkerConfig, UpConfig):
        with pytest.raises(ConfigError, match="--threads must not be negative"):
            kind(threads=-1)
        assert kind(threads=3).threads == 3
