"""A TCP proxy between two endpoints that damages, delays, cuts or swallows what passes.

Its faults are attributes and methods, to be used at any time; `happened` counts what they did.
"""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from kvtransfer.accepting import accept

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing throws away what is under way."""


class Proxy:
    """Forwards connections to `target` (tcp://host:port); `address` is where it listens."""

    def __init__(self, target: str, seed: int = 0) -> None:
        self._host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._port = int(port)
        self._random = Random(seed)
        self._bridges: set[asyncio.Task[None]] = set()
        self._open: dict[socket.socket, socket.socket] = {}
        """The sender's end of a connection to that of the receiver."""
        self.address = ""
        self.num_connections = 0
        self.forwarded = 0
        """Bytes that passed from the sender to the receiver."""
        self.swallow = False
        """Read on, forward nothing: a black hole with open sockets."""
        self.flip = 0.0
        """Probability that a piece (what one read returns) arrives with a flipped bit."""
        self.reset = 0.0
        """Probability that a piece cuts its connection in its middle."""
        self.slice_bytes = 0
        """A piece is passed on in slices of this size (0: as a whole)."""
        self.delay_s = 0.0
        """A piece waits so long."""
        self.bytes_per_s = 0.0
        """Throttle (0: none)."""
        self.happened: Counter[str] = Counter()
        """Faults on the way to the receiver, by name."""

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
        self.happened["cut"] += len(self._open)
        for ends in self._open.items():
            for end in ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for bridge in self._bridges:
            bridge.cancel()

    def cut_senders(self) -> None:
        """End the senders' connections alone: what is delayed still comes, beside new ones."""
        self.happened["late"] += len(self._open)
        for near in self._open:
            near.shutdown(socket.SHUT_RDWR)

    def half_close(self) -> None:
        """The receiver sees an end of file, the sender nothing."""
        self.happened["half_close"] += len(self._open)
        for far in self._open.values():
            far.shutdown(socket.SHUT_WR)

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
            pumps: list[asyncio.Task[None]] = []
            try:
                await loop.sock_connect(far, (self._host, self._port))
                self._open[near] = far
                pumps += [
                    loop.create_task(self._pump(near, far)),
                    loop.create_task(self._answer(far, near)),
                ]
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            except ConnectionError:
                pass  # nobody is there any more
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._open.pop(near, None)

    async def _answer(self, far: socket.socket, near: socket.socket) -> None:
        """From the receiver to the sender: unharmed."""
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(far, 1 << 16):
                await loop.sock_sendall(near, data)
        except OSError:
            pass  # cut: by the test, or by an endpoint that closed

    async def _pump(self, near: socket.socket, far: socket.socket) -> None:
        """From the sender to the receiver."""
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(near, 1 << 16):
                if self.swallow:
                    self.happened["swallowed"] += 1
                    continue
                await self._pass(bytearray(data), far)
                self.forwarded += len(data)
        except OSError:
            pass  # cut: by the test, or by an endpoint that closed

    async def _pass(self, data: bytearray, far: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if self.delay_s:
            self.happened["delayed"] += 1
            await asyncio.sleep(self.delay_s)
        if self._random.random() < self.flip:
            self.happened["flipped"] += 1
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        if self._random.random() < self.reset:
            self.happened["reset"] += 1
            await loop.sock_sendall(far, data[: len(data) // 2])
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            raise ConnectionResetError
        step = self.slice_bytes or int(self.bytes_per_s / 20) or len(data)
        for start in range(0, len(data), step):
            if self.bytes_per_s:
                self.happened["throttled"] += 1
                await asyncio.sleep(step / self.bytes_per_s)
            await loop.sock_sendall(far, data[start : start + step])
            if self.slice_bytes:
                self.happened["sliced"] += 1
                await asyncio.sleep(0)


@asynccontextmanager
async def proxy(target: str) -> AsyncIterator[Proxy]:
    between = Proxy(target)
    await between.start()
    try:
        yield between
    finally:
        await between.close()
