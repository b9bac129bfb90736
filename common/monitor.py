"""The HTTP port of a worker: GET /metrics and GET /health. Runs in the I/O thread.

Two fixed pages need no web framework; a request that is not understood is answered by 404.
"""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from common.errors import ConfigError
from common.metrics import CONTENT_TYPE, WorkerMetrics

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_REQUEST_S = 5.0
"""A client that does not send its request within this time is cut off."""


class Transfers(Protocol):
    """The transfer endpoint (`common.host.TransferEndpoint`)."""

    def stats(self) -> "DataclassInstance": ...


class Monitor:
    """Serves the metrics and the state of one worker on a free port."""

    def __init__(self, metrics: WorkerMetrics, transfers: Transfers) -> None:
        self.url = ""
        self.state = "ready"
        self._metrics = metrics
        self._transfers = transfers
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> None:
        """Bind a free port; `url` is known afterwards. Raises ConfigError."""
        try:
            self._server = await asyncio.start_server(self._answer, host, 0)
        except OSError as error:
            raise ConfigError(f"cannot bind {host}: {error}") from error
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client may vanish at any point; that concerns nobody else.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(MAX_REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._page(head.split(b" ", 2)[:2]))
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def _page(self, request: list[bytes]) -> bytes:
        match request:
            case [b"GET", b"/metrics"]:
                self._metrics.show_transfers(self._transfers.stats())
                status, kind, body = "200 OK", CONTENT_TYPE, self._metrics.render()
            case [b"GET", b"/health"]:
                status = "200 OK" if self.state == "ready" else "503 Service Unavailable"
                kind, body = "application/json", b'{"state": "%s"}' % self.state.encode()
            case _:
                status, kind, body = "404 Not Found", "text/plain", b"not found\n"
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Connection: close\r\n\r\n" + body
