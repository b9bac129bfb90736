"""The HTTP response of a completion: written as prebuilt ASGI messages, token by token.

The route has done authorization, limits and body; from here on nothing stands between an engine's
output and the socket: no validation, no middleware that looks at chunks. Owns the life of the
call's requests: they are submitted here and, whatever happens, cancelled or over at the end.

Every engine step is a chunk of its own, and is written in the call that brings it: what begins and
ends an answer goes through ASGI, what comes between does not. Only for a client that does not read
as fast as tokens come, the chunks that came during a write leave in one write; one that is too far
behind is left.
"""

import asyncio
import logging
from functools import partial
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import RequestError
from router import errors
from router.connection import Outlet, abort
from router.intake import Call
from router.metrics import Usage
from router.request import Delta, Event
from router.service import Service

log = logging.getLogger(__name__)

_SSE_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Reply(Response):
    """Not initialised as a Response: it has neither body nor headers until the first token."""

    def __init__(self, call: Call, service: Service, usage: Usage) -> None:
        self._call = call
        self._usage = usage
        self._service = service
        self._open_choices = call.answer.num_choices
        self.background = None
        self._bug: Exception | None = None
        """What went wrong outside the task of this call, which is where it belongs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watchers = [asyncio.create_task(self._watch(receive))]
        try:
            for request in self._call.requests:
                self._service.submit(request)
            if self._call.stream:
                watchers.append(asyncio.create_task(self._leave_behind(scope)))
                await self._stream(scope, receive, send)
            else:
                await self._collect(scope, receive, send)
        finally:
            for watcher in watchers:
                watcher.cancel()
            self._call.events.write_now = None  # which holds this reply: no circle is left behind
            self._cancel()
            for request in self._call.requests:
                if request.next_attempt > 1:  # what no worker got was not served
                    self._usage.count(self._call.tenant, len(request.prompt), request.num_outputs)

    def _cancel(self) -> None:
        for request in self._call.requests:
            self._service.cancel(request)

    async def _watch(self, receive: Receive) -> None:
        """Cancel the work as soon as the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            continue
        self._cancel()
        self._call.events.put_nowait(None)

    async def _leave_behind(self, scope: Scope) -> None:
        """End the call, and its connection with it, if the client is too far behind."""
        await self._call.events.overflow.wait()
        self._cancel()
        log.warning("request %s: the client does not read its answer", self._call.requests[0].label)
        abort(scope)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, events = self._call.answer, self._call.events
        item = await events.get()
        if isinstance(item, RequestError):
            # Nothing was sent yet: a plain HTTP error, which every client understands.
            await errors.response(item)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        write_now = partial(self._write_now, Outlet(scope))
        parts = [answer.opening()]
        over = False
        while item is not None and not over:
            if isinstance(item, RequestError):
                parts.append(answer.failure(item))
                over = True
            else:
                parts.append(self._chunk(item))
                over = self._open_choices == 0
                if over:
                    parts.append(answer.closing())
            if over or events.empty():
                body = b"".join(parts)
                events.is_writing = True
                await send({"type": "http.response.body", "body": body, "more_body": not over})
                events.is_writing = False
                events.write_now = write_now
                parts.clear()
            if not over:
                item = await events.get()
                if self._bug is not None:
                    raise self._bug

    def _write_now(self, outlet: Outlet, item: Event | None) -> bool:
        """The chunk of a token in the midst of an answer; called by whoever puts it in."""
        if not isinstance(item, Delta) or item.finish or not outlet.is_open:
            return False
        try:
            self._call.answer.take(item)
            outlet.write(self._call.answer.chunk(item))
        except Exception as bug:
            # Whatever one call trips over must not end the others: its own task raises it.
            self._bug = bug
            return False
        return True

    def _chunk(self, delta: Delta) -> bytes:
        self._call.answer.take(delta)
        self._open_choices -= bool(delta.finish)
        return self._call.answer.chunk(delta)

    async def _collect(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._call.answer
        while self._open_choices:
            item = await self._call.events.get()
            if item is None:
                return
            if isinstance(item, RequestError):
                await errors.response(item)(scope, receive, send)
                return
            answer.take(item)
            self._open_choices -= bool(item.finish)
        response = Response(answer.whole(), media_type=errors.JSON)
        await response(scope, receive, send)
