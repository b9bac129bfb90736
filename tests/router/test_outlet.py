"""Parts of an answer that are written without ASGI: the same bytes, and only while they may be."""

import asyncio
from contextlib import suppress

from starlette.types import Receive, Scope, Send

from router.connection import Outlet
from router.server import Server, http_config, listen

HEAD = b"\r\n\r\n"


async def answer_of(scope_seen: list[bool], request: bytes) -> bytes:
    """What a client reads of an answer in three parts, of which the second is written at once."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        outlet = Outlet(scope)
        scope_seen.append(outlet.is_open)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        scope_seen.append(outlet.is_open)
        if outlet.is_open:
            outlet.write(b"")
            outlet.write(b"two ")
        await send({"type": "http.response.body", "body": b"three", "more_body": False})
        scope_seen.append(outlet.is_open)

    listener = listen("127.0.0.1", 0)
    server = Server(http_config(app))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
    writer.write(request)
    data = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    server.should_exit = True
    await serving
    listener.close()
    return data.partition(HEAD)[2]


async def test_a_part_is_written_as_send_writes_it() -> None:
    seen: list[bool] = []
    body = await answer_of(seen, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert body == b"4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n"
    assert seen == [False, True, False], "not before the answer began, not after its end"


async def test_an_answer_without_a_body_has_no_outlet() -> None:
    seen: list[bool] = []
    assert await answer_of(seen, b"HEAD / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n") == b""
    assert seen == [False, False, False]
