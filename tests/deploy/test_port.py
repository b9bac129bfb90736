"""The reserved port: nobody else gets it, the server does, and one in use is refused."""

import socket

import pytest

from common.errors import ConfigError
from deploy import port

HOST = "127.0.0.1"


def listener(number: int, reuse: bool) -> socket.socket:
    result = socket.socket()
    if reuse:
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        result.bind((HOST, number))
        result.listen()
    except OSError:
        result.close()
        raise
    return result


def test_the_server_may_listen_and_listen_again() -> None:
    with port.reserved(HOST, 0) as number:
        assert number > 0
        for _ in range(2):
            with listener(number, reuse=True), socket.create_connection((HOST, number), 5):
                pass


def test_nobody_else_may_listen() -> None:
    with port.reserved(HOST, 0) as number, pytest.raises(OSError, match="in use"):
        listener(number, reuse=False)


def test_a_port_in_use_is_refused() -> None:
    with listener(0, reuse=True) as server:
        number = server.getsockname()[1]
        message = f"^port {number} of 127.0.0.1 is in use; choose another --port$"
        with pytest.raises(ConfigError, match=message), port.reserved(HOST, number):
            pass


@pytest.mark.parametrize(
    ("host", "number", "message"),
    [
        ("192.0.2.1", 0, "cannot listen on port 0 of 192.0.2.1: Cannot assign requested address"),
        ("256.0.0.1", 0, "--host 256.0.0.1 is no address"),
        (HOST, 70000, "--port 70000 is not between 0 and 65535"),
        (HOST, -1, "--port -1 is not between 0 and 65535"),
    ],
)
def test_bad_addresses(host: str, number: int, message: str) -> None:
    with pytest.raises(ConfigError) as error, port.reserved(host, number):
        pass
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_url(host: str, url: str) -> None:
    assert port.url_of(host, 80) == url
