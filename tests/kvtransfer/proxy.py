"""A TCP proxy between two endpoints that can cut its connections, or swallow what passes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Forwards connections to `target` (tcp://host:port); `address` is where it listens."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.address = ""
        self.num_connections = 0
        self.forwarded = 0
        """Bytes that passed from the sender to the receiver."""
        self.swallow = False
        """Read on, forward nothing: a black hole with open sockets."""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        self.cut()
        if self._pumps:
            await asyncio.wait(self._pumps)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, far_writer}
        loop = asyncio.get_running_loop()
        for source, sink, counts in ((reader, far_writer, True), (far_reader, writer, False)):
            task = loop.create_task(self._pump(source, sink, counts))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counts: bool
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                if self.swallow:
                    continue
                sink.write(data)
                await sink.drain()
                if counts:
                    self.forwarded += len(data)
        except ConnectionError:
            pass  # cut: by the test, or by an endpoint that closed
        finally:
            sink.transport.abort()
            self._writers.discard(sink)


@asynccontextmanager
async def proxy(target: str) -> AsyncIterator[Proxy]:
    between = Proxy(target)
    await between.start()
    try:
        yield between
    finally:
        await between.close()
