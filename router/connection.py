"""One HTTP connection: uvicorn's, with bounds on what a client may send and leave unread.

uvicorn limits neither headers nor the time that a write may take. Made by uvicorn for every
connection of `router.server`; `abort` and `Outlet` are for `router.reply`.
"""

import asyncio
import logging
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from common.errors import RequestError
from router import errors
from router.caps import DEFAULT

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S: Final = 30.0
"""A client that reads nothing for this long, while there is something to read, is gone."""
_OURS: Final = "tandem.connection"


def abort(scope: Scope) -> None:
    """End the connection of a call at once; what was not sent is dropped."""
    scope["extensions"][_OURS]["cycle"].transport.abort()


class Outlet:
    """Where parts of an answer that ASGI's `send` began can be written without it, at once."""

    __slots__ = ("_cycle",)

    def __init__(self, scope: Scope) -> None:
        self._cycle: RequestResponseCycle = scope["extensions"][_OURS]["cycle"]

    @property
    def is_open(self) -> bool:
        """Nothing is to be waited for, nor has the answer or its client come to an end."""
        cycle = self._cycle
        over = cycle.response_complete or cycle.disconnected
        return bool(cycle.chunked_encoding) and not over and not cycle.flow.write_paused

    def write(self, body: bytes) -> None:
        """A part of the body, as `send` writes it. To be called where `is_open`."""
        if body:  # a chunk of nothing would be the end
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class HeadersTooLargeError(Exception):
    """Ends the parser from within one of its callbacks."""


class HttpServerConfig(uvicorn.Config):
    max_header_bytes = DEFAULT.header_bytes


class Connection(HttpToolsProtocol):
    def __init__(self, config: HttpServerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._max_header_bytes = config.max_header_bytes
        self._header_bytes = 0
        """Of the request that is being received, as far as they are parsed."""
        self._unparsed = 0
        """Bytes since something was parsed: of a header or a chunk size that does not end."""
        self._is_silent = True
        """Nothing was parsed since this was set."""
        self._is_refused = False
        self._write_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._is_silent = True
        super().data_received(data)
        self._unparsed = self._unparsed + len(data) if self._is_silent else 0
        if self._unparsed > self._max_header_bytes:
            self._refuse_headers()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to whatever ended its parser."""
        if self._header_bytes > self._max_header_bytes:
            self._refuse_headers()
        else:
            self._refuse(RequestError(400, msg, code="invalid_http"))

    def _refuse_headers(self) -> None:
        message = f"The headers are larger than {self._max_header_bytes} bytes."
        self._refuse(RequestError(431, message, code="headers_too_large"))

    def _refuse(self, error: RequestError) -> None:
        """The end of the connection: what follows cannot be read."""
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is on its way, maybe half written: there is no room for another.
            self.transport.abort()
            return
        content = errors.body(error)
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"content-type: {errors.JSON}\r\ncontent-length: {len(content)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_silent = False
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def _count(self, num_bytes: int) -> None:
        self._is_silent = False
        self._header_bytes += num_bytes
        if self._header_bytes > self._max_header_bytes:
            raise HeadersTooLargeError

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # The task that answers begins after this.
        self.scope["extensions"] = {_OURS: {"cycle": self.cycle}}
        self._is_silent = False

    def on_body(self, body: bytes) -> None:
        self._is_silent = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_silent = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._give_up)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_write_timer()
        super().connection_lost(exc)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _give_up(self) -> None:
        log.warning("a client has read nothing for %g s; its connection is closed", WRITE_TIMEOUT_S)
        self.transport.abort()
