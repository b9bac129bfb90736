"""An OpenAI-compatible stub with a fixed TTFT and ITL that notes when it really sent each token."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec


@dataclass
class SlowServer:
    """Answers `/v1/completions` streams: first token after `ttft_s`, then one each `itl_s`."""

    ttft_s: float
    itl_s: float
    url: str = ""
    reject: bool = False
    """Answer every request with 429."""
    sent: list[list[float]] = field(default_factory=list)
    """Per request: arrival, then the time of each token."""
    prompts: list[list[int]] = field(default_factory=list)

    connections: set["asyncio.Task[None]"] = field(default_factory=set)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            writer.close()
            self.connections.discard(task)

    async def close(self) -> None:
        """End all connections, also those in the middle of an answer."""
        while self.connections:
            for task in self.connections:
                task.cancel()
            await asyncio.wait(set(self.connections))

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        arrived = time.perf_counter()
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        body = msgspec.json.decode(await reader.readexactly(length))
        self.prompts.append(body["prompt"])
        if self.reject:
            writer.write(b"HTTP/1.1 429 Too Many\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        times = [arrived]
        self.sent.append(times)
        for i in range(body["max_tokens"]):
            due = arrived + self.ttft_s + i * self.itl_s
            await asyncio.sleep(due - time.perf_counter())
            event = {"choices": [{"index": 0, "text": "x", "token_ids": [7 + i]}]}
            times.append(time.perf_counter())
            self._event(writer, msgspec.json.encode(event))
            await writer.drain()
        usage = {"completion_tokens": body["max_tokens"]}
        self._event(writer, msgspec.json.encode({"choices": [], "usage": usage}))
        self._event(writer, b"[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    @staticmethod
    def _event(writer: asyncio.StreamWriter, data: bytes) -> None:
        line = b"data: " + data + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(line), line))


@asynccontextmanager
async def slow_server(ttft_s: float, itl_s: float) -> AsyncIterator[SlowServer]:
    stub = SlowServer(ttft_s, itl_s)
    server = await asyncio.start_server(stub.handle, "127.0.0.1", 0)
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        try:
            yield stub
        finally:
            await stub.close()
            await asyncio.sleep(0)  # closed transports are let go of
