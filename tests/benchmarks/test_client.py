"""What the client makes of streams, well-formed and not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.client import Record, Target, connect, send


@asynccontextmanager
async def server(*events: bytes, end: bytes = b"data: [DONE]\n\n") -> AsyncIterator[str]:
    """Answers one request with these events, in pieces that do not respect their borders."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        text = b"".join(b"data: " + event + b"\n\n" for event in events) + end
        for i in range(0, len(text), 11):
            writer.write(text[i : i + 11])
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/completions"


async def ask(url: str) -> Record:
    target = Target(url, None, {}, {}, 5.0)
    async with connect() as session:
        return await send(session, target, target.body([1, 2, 3], 4), Record(due=0.0))


TOKEN = b'{"choices": [{"index": 0, "text": "x", "finish_reason": null}], "usage": null}'
LAST = b'{"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}'
EMPTY_LAST = b'{"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}'


def usage(tokens: int) -> bytes:
    details = '{"cached_tokens": 2}'
    fields = f'"completion_tokens": {tokens}, "prompt_tokens_details": {details}'
    return f'{{"choices": [], "usage": {{{fields}}}}}'.encode()


async def test_chunks_and_usage() -> None:
    async with server(TOKEN, TOKEN, LAST, usage(3)) as url:
        record = await ask(url)
    assert (record.error, len(record.chunks), record.output_len) == ("", 3, 3)
    assert record.cached_tokens == 2
    assert record.ended == record.chunks[-1]


async def test_an_end_in_a_chunk_of_its_own_is_no_token() -> None:
    async with server(TOKEN, TOKEN, EMPTY_LAST, usage(2)) as url:
        record = await ask(url)
    assert (record.error, len(record.chunks), record.output_len) == ("", 2, 2)
    # Held back or empty text is a token where the server counts it as one.
    async with server(TOKEN, TOKEN, EMPTY_LAST, usage(3)) as url:
        assert len((await ask(url)).chunks) == 3


@pytest.mark.parametrize(
    ("events", "end", "error"),
    [
        ([TOKEN], b"", "the stream ended without [DONE]"),
        ([usage(0)], b"data: [DONE]\n\n", "the stream carried no token"),
        ([TOKEN, b"{oops"], b"", "malformed event: "),
        ([b"[1]"], b"", "malformed event: "),
        ([TOKEN, b'{"error": {"message": "gone"}}'], b"data: [DONE]\n\n",
         'stream error: {"message": "gone"}'),
    ],
)  # fmt: skip
async def test_bad_streams_are_errors(events: list[bytes], end: bytes, error: str) -> None:
    async with server(*events, end=end) as url:
        record = await ask(url)
    assert record.error.startswith(error)
    assert not record.ok
    assert record.ended >= record.sent > 0


async def test_a_silent_server_is_an_error_after_the_timeout() -> None:
    left = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        target = Target(url, None, {}, {}, 0.1)
        async with connect() as session:
            record = await send(session, target, b"{}", Record(due=0.0))
        await left.wait()
    assert record.error.startswith("TimeoutError")
