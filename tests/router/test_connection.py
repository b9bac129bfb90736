"""Connections are bounded: what a client may send before it is known, and what it may not read."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from common.messages import Cancel
from router import backlog, connection, server
from router.answer import Answer
from router.caps import DEFAULT, Caps
from router.request import Delta
from tests.client import body, complete, stream
from tests.router.conftest import Deploy
from tests.router.deployment import Deployment, until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PROMPT = list(range(10, 40))
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@contextlib.asynccontextmanager
async def connected(served: Deployment) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(served.url).port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    "head",
    [
        [b"GET /health HTTP/1.1\r\n", *[b"x-%d: %s\r\n" % (i, b"a" * 1000) for i in range(64)]],
        [b"GET /health HTTP/1.1\r\nx: ", *[b"a" * 1000] * 64],
        [b"GET /", *[b"a" * 1000] * 64],
        [b"\r\n" * 500] * 64,
    ],
)
async def test_headers_that_do_not_end(deploy: Deploy, head: list[bytes]) -> None:
    async with deploy(prefill=0, api_key="key") as served, connected(served) as (reader, writer):
        for part in head:
            writer.write(part)
            await asyncio.sleep(0)
        try:
            assert b"431" in await asyncio.wait_for(reader.readline(), 10)
            body = (await reader.read()).partition(b"\r\n\r\n")[2]
        except ConnectionResetError:  # what the server did not read any more overtook its answer
            return
        assert json.loads(body)["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "head",
    [
        b"\0\1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
    ],
)
async def test_what_is_no_http(deploy: Deploy, head: bytes) -> None:
    async with deploy(prefill=0) as served, connected(served) as (reader, writer):
        writer.write(head)
        assert await asyncio.wait_for(reader.readline(), 10) == b"HTTP/1.1 400 Bad Request\r\n"
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        assert json.loads(body)["error"]["code"] == "invalid_http"


async def test_large_headers_and_many_requests_are_fine(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        headers = {"x-large": "a" * (DEFAULT.header_bytes - 1_000)}
        async with httpx.AsyncClient(base_url=served.url) as http:
            for _ in range(4):
                assert (await http.get("/health", headers=headers)).status_code == 200
            prompt = [5] * 20_000
            response = await http.post("/v1/completions", json={"prompt": prompt}, headers=headers)
            assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_trailers_that_do_not_end(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served, connected(served) as (reader, writer):
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        writer.write(b"2\r\n{}\r\n0\r\n")
        for _ in range(64):
            writer.write(b"x-trailer: " + b"a" * 1000 + b"\r\n")
            await asyncio.sleep(0)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 10) == b""


def ask(served: Deployment, **body: object) -> socket.socket:
    """A client that asks for a stream and reads nothing of it."""
    content = json.dumps({"prompt": PROMPT, "stream": True, **body}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.connect(("127.0.0.1", httpx.URL(served.url).port))
    head = HEAD + b"content-length: %d\r\n\r\n"
    client.sendall(head % len(content) + content)
    return client


async def test_a_client_that_does_not_read_is_left(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backlog, "MAX_EVENTS", 64)
    async with deploy(prefill=0, max_model_len=100_000, num_blocks=100_000) as served:
        (worker,) = served.decodes
        with ask(served, n=8, max_tokens=90_000, logprobs=20, ignore_eos=True):
            await until(lambda: served.service.num_live == 1)
            await until(lambda: served.service.num_live == 0, timeout_s=30)
            await until(lambda: worker.num_running == 0)
        assert worker.received(Cancel)
        assert "the client does not read its answer" in caplog.text
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert (await complete(served.http, PROMPT, max_tokens=3)).status == 200


async def test_a_write_that_does_not_end(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(backlog, "MAX_EVENTS", 10**9)
    async with deploy(prefill=0, max_model_len=100_000, num_blocks=100_000) as served:
        with ask(served, n=8, max_tokens=90_000, logprobs=20, ignore_eos=True):
            await until(lambda: served.service.num_live == 1)
            await until(lambda: served.service.num_live == 0, timeout_s=30)
        await until(lambda: served.decodes[0].num_running == 0)
        assert "has read nothing for 0.2 s" in caplog.text
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_clients_that_do_not_read_do_not_hold_up_the_end(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "CLOSE_S", 0.3)
    monkeypatch.setattr(backlog, "MAX_EVENTS", 10**9)
    async with deploy(prefill=0, max_model_len=100_000, num_blocks=100_000) as served:
        client = ask(served, n=8, max_tokens=90_000, logprobs=20, ignore_eos=True)
        await until(lambda: served.value("output_tokens_total") > 10_000, timeout_s=30)
    client.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_client_that_leaves_amid_its_request(
    deploy: Deploy, caplog: pytest.LogCaptureFixture
) -> None:
    async with deploy(prefill=0) as served:
        async with connected(served) as (_, writer):
            writer.write(HEAD + b'content-length: 99\r\n\r\n{"prompt":')
            await writer.drain()
            await asyncio.sleep(0.05)
        await until(lambda: served.value("http_errors_total", status="499") == 1)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_body_that_comes_too_slowly(deploy: Deploy) -> None:
    async with (
        deploy(prefill=0, caps=Caps(upload_s=0.1)) as served,
        connected(served) as (reader, writer),
    ):
        writer.write(HEAD + b"content-length: 99\r\n\r\n{")
        answer = await asyncio.wait_for(reader.read(), 10)  # to its end: the connection is closed
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["code"] == "timeout"


async def test_headers_of_proxies_are_not_believed(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    async with deploy(prefill=0, api_key="key") as served:
        async with httpx.AsyncClient(base_url=served.url) as http:
            response = await http.get("/debug/workers", headers={"x-forwarded-for": "8.8.8.8"})
            assert response.status_code == 200, "the connection is from this machine"


@pytest.mark.parametrize("path", ["/health", "/ping", "/version"])
async def test_probes_without_a_body(deploy: Deploy, path: str) -> None:
    async with deploy(prefill=0, api_key="key") as served:
        async with httpx.AsyncClient(base_url=served.url) as http:
            asked, probed = await http.get(path), await http.head(path)
            assert (probed.status_code, probed.content) == (200, b"")
            assert probed.headers["content-length"] == asked.headers["content-length"]


async def test_a_bug_in_one_answer_ends_that_one_alone(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = Answer.chunk

    def trips(answer: Answer, delta: Delta) -> bytes:
        if answer._requests[0].label == "bad" and len(answer._tallies[0].tokens) == 3:
            raise ArithmeticError("a bug")
        return chunk(answer, delta)

    monkeypatch.setattr(Answer, "chunk", trips)
    async with deploy(prefill=0) as served:
        other = asyncio.create_task(stream(served.http, PROMPT, seed=5, max_tokens=100))
        asked = served.http.stream(
            "POST",
            "/v1/completions",
            json=body(PROMPT, stream=True, max_tokens=100),
            headers={"x-request-id": "bad"},
        )
        with pytest.raises(httpx.RemoteProtocolError):
            async with asked as response:
                await response.aread()
        assert (await other).done
        await until(lambda: served.service.num_live == 0)
        await until(lambda: served.decodes[0].num_running == 0)
