"""The HTTP server of the router: its listening socket and uvicorn, without uvicorn's habits.

Called by `router.main`; what one connection may do is in `router.connection`.
"""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from common.config import HttpConfig
from common.errors import ConfigError
from router.caps import DEFAULT, Caps
from router.connection import Connection, HttpServerConfig

BACKLOG: Final = 2_048
CLOSE_S: Final = 5.0
"""How long answers that are over may take to be written when the server ends."""


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


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of a certificate chain and its key; None: the key is in the same file."""

    certificate: str
    key: str | None = None

    @classmethod
    def of(cls, config: HttpConfig) -> "Tls | None":
        """Raises ConfigError, in one line, if they cannot be used."""
        if config.ssl_certfile is None:
            return None
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without a password callback OpenSSL would ask on the terminal.
            context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: "")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--ssl-certfile {config.ssl_certfile}: {error}") from error
        return cls(config.ssl_certfile, config.ssl_keyfile)


def http_config(
    app: ASGIApp, caps: Caps = DEFAULT, tls: Tls | None = None, keep_alive_s: float = 75.0
) -> HttpServerConfig:
    """How uvicorn serves `app`: no headers of proxies believed, bounded connections.

    `keep_alive_s` is longer than clients keep an idle connection (often 5 to 60 s): a request
    must not meet the end of the connection that it is sent on.
    """
    config = HttpServerConfig(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        timeout_keep_alive=round(keep_alive_s),
        ssl_certfile=tls.certificate if tls is not None else None,
        ssl_keyfile=tls.key if tls is not None else None,
    )
    config.max_header_bytes = caps.header_bytes
    return config


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: this process drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends connections, not tasks: whoever waits for a client then sees that it is gone."""
        timer = asyncio.get_running_loop().call_later(CLOSE_S, self._abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _abort_all(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
