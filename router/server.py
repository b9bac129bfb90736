"""The HTTP server of the router: its listening socket and uvicorn, without uvicorn's habits."""

import contextlib
import errno
import socket
from collections.abc import Generator
from typing import Final

import uvicorn

from common.errors import ConfigError

BACKLOG: Final = 2_048


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError, in one line."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; choose another --port") from error
        raise ConfigError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: this process drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
