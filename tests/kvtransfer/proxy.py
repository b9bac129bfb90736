"""A TCP proxy between two endpoints that can cut its connections, or swallow what passes."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvtransfer.accepting import accept

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing throws away what is under way."""


class Proxy:
    """Forwards connections to `target` (tcp://host:port); `address` is where it listens."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._port = int(port)
        self._bridges: set[asyncio.Task[None]] = set()
        self._open: set[socket.socket] = set()
        self.address = ""
        self.num_connections = 0
        self.forwarded = 0
        """Bytes that passed from the sender to the receiver."""
        self.swallow = False
        """Read on, forward nothing: a black hole with open sockets."""

    async def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        self._acceptor.cancel()
        self.cut()
        await asyncio.wait([self._acceptor, *self._bridges])
        self._listener.close()

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        for connection in self._open:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for bridge in self._bridges:
            bridge.cancel()

    async def _accept(self) -> None:
        while True:
            near = await accept(self._listener)
            self.num_connections += 1
            bridge = asyncio.get_running_loop().create_task(self._bridge(near))
            self._bridges.add(bridge)
            bridge.add_done_callback(self._bridges.discard)

    async def _bridge(self, near: socket.socket) -> None:
        """Both directions of one connection; it ends with the first of them."""
        loop = asyncio.get_running_loop()
        with near, socket.socket() as far:
            far.setblocking(False)
            self._open |= {near, far}
            pumps: list[asyncio.Task[None]] = []
            try:
                await loop.sock_connect(far, (self._host, self._port))
                for source, sink, counts in ((near, far, True), (far, near, False)):
                    pumps.append(loop.create_task(self._pump(source, sink, counts)))
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            except ConnectionError:
                pass  # nobody is there any more
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._open -= {near, far}

    async def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(source, 1 << 16):
                if self.swallow:
                    continue
                await loop.sock_sendall(sink, data)
                if counts:
                    self.forwarded += len(data)
        except ConnectionError:
            pass  # cut: by the test, or by an endpoint that closed


@asynccontextmanager
async def proxy(target: str) -> AsyncIterator[Proxy]:
    between = Proxy(target)
    await between.start()
    try:
        yield between
    finally:
        await between.close()
