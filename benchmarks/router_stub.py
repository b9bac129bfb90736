"""What stands behind a router in `benchmarks.router`: 32 tokens per request and no model.

    python -m benchmarks.router_stub http GAP_MS                   an OpenAI server, SSE
    python -m benchmarks.router_stub worker GAP_MS REDIS MODEL     a Tandem decode worker
    python -m benchmarks.router_stub proxy BACKEND_URL             FastAPI + httpx, nothing else

Each prints a line when it is ready: its port. GAP_MS 0: all tokens at once.
"""

import asyncio
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from common.blockhash import unpack_tokens
from common.config import TimerConfig
from common.identity import text_id
from common.link import WorkerLink
from common.messages import (
    Admit,
    Cancel,
    KvLayoutInfo,
    Load,
    Output,
    Ping,
    Pong,
    Step,
    WorkerInfo,
)
from common.registry import Registration
from router.membership import content_ids

TOKENS: Final = 32
TOKEN: Final = 40
"""Every token of every answer: an ordinary word of any vocabulary."""


def ready(port: int) -> None:
    print(port, flush=True)


def listen() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # Inherited by every connection; asyncio does it only where it knows the protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ready(listener.getsockname()[1])
    return listener


# ------------------------------------------------------------ an OpenAI server


async def serve_http(gap_s: float) -> None:
    chunk = {
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "stub",
        "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
    }  # fmt: skip
    event = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    frame = b"%x\r\n%s\r\n" % (len(event), event)
    done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    plain = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if not request.startswith(b"POST"):
                    writer.write(plain)
                    continue
                length = next(
                    int(line[15:])
                    for line in request.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                )
                await reader.readexactly(length)
                if gap_s == 0:
                    writer.write(head + TOKENS * frame + done)
                    continue
                writer.write(head)
                for _ in range(TOKENS):
                    writer.write(frame)
                    await asyncio.sleep(gap_s)
                writer.write(done)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, sock=listen())
    await server.serve_forever()


# ------------------------------------------------------------ a decode worker


@dataclass(slots=True)
class Stream:
    request: int
    attempt: int
    router: bytes
    sent: int = 0


def describe(model: Path) -> WorkerInfo:
    return WorkerInfo(
        id=f"stub-{secrets.token_hex(4)}", epoch=secrets.randbits(63), role="decode",
        pid=os.getpid(), address="", kv_address="tcp://127.0.0.1:1",
        metrics_url="http://127.0.0.1:1/metrics", model=str(model),
        content_id=min(content_ids(model), default="stub"), text_id=text_id(model, None),
        layout=KvLayoutInfo(block_size=16, num_layers=1, num_kv_heads=1, head_dim=8,
                            dtype="float32"),
        vocab_size=1000, max_model_len=8192, num_blocks=1 << 20, max_num_seqs=1 << 14,
        max_num_batched_tokens=512, eos_token_ids=(0,),
    )  # fmt: skip


class Worker:
    def __init__(self, gap_s: float, redis: str, model: Path) -> None:
        timers = TimerConfig()
        self._gap_s = gap_s
        self._link = WorkerLink("127.0.0.1", timers)
        self._info = describe(model)
        self._redis = redis
        self._ttl_s = timers.registry_ttl_s
        self._streams: dict[tuple[int, int], Stream] = {}
        self._steps = 0
        self._wake = asyncio.Event()

    async def run(self) -> None:
        await self._link.start()
        self._info = msgspec.structs.replace(self._info, address=self._link.address)
        self._link.set_info(self._info)
        registration = Registration(self._redis, "default", self._ttl_s, self._info)
        ready(0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(registration.run())
            tasks.create_task(self._read())
            tasks.create_task(self._generate())

    async def _read(self) -> None:
        while True:
            router, message = await self._link.receive()
            match message:
                case Ping(seq):
                    self._link.send(router, Pong(seq, self._info.epoch, self._steps, self._load()))
                case Admit(request=request, attempt=attempt, tokens=tokens):
                    assert unpack_tokens(tokens)
                    stream = Stream(request, attempt, router)
                    self._streams[request, attempt] = stream
                    if self._gap_s:
                        # As the HTTP server does: the first token does not wait for a step.
                        self._link.send(router, Step((self._next(stream),), self._load()))
                    self._wake.set()
                case Cancel(request, attempt):
                    self._streams.pop((request, attempt), None)

    async def _generate(self) -> None:
        """One token of each stream per step, or all of them in one."""
        while True:
            if not self._streams:
                self._wake.clear()
                await self._wake.wait()
            self._steps += 1
            outputs: dict[bytes, list[Output]] = {}
            for key, stream in list(self._streams.items()):
                count = 1 if self._gap_s else TOKENS
                for _ in range(count):
                    outputs.setdefault(stream.router, []).append(self._next(stream))
                if stream.sent == TOKENS:
                    del self._streams[key]
            for router, some in outputs.items():
                self._link.send(router, Step(tuple(some), self._load()))
            await asyncio.sleep(self._gap_s)

    def _next(self, stream: Stream) -> Output:
        index = stream.sent
        stream.sent += 1
        finish = "length" if stream.sent == TOKENS else ""
        return Output(
            stream.request, stream.attempt, 0, index, (TOKEN,), finish,
            cached_tokens=0 if index == 0 else -1,
        )  # fmt: skip

    def _load(self) -> Load:
        return Load(running=len(self._streams), free_blocks=1 << 20)


# ------------------------------------------------------------ the smallest proxy


def serve_proxy(backend: str) -> None:
    import httpx  # a dev dependency, which the other roles do without

    app = FastAPI()
    client = httpx.AsyncClient(
        base_url=backend, timeout=None, limits=httpx.Limits(max_connections=None)
    )

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        upstream = await client.send(
            client.build_request("POST", "/v1/completions", json=body), stream=True
        )
        return StreamingResponse(
            upstream.aiter_raw(), upstream.status_code, media_type="text/event-stream"
        )

    listener = listen()
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def main(role: str, *arguments: str) -> None:
    if role == "http":
        asyncio.run(serve_http(float(arguments[0]) / 1000))
    elif role == "worker":
        gap, redis, model = arguments
        asyncio.run(Worker(float(gap) / 1000, redis, Path(model)).run())
    else:
        serve_proxy(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
