"""Data over TCP, received: the kernel writes straight into the slots that were granted.

The form of the data is in `tcp_transport`. Each piece is digested while it is in the cache.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

import xxhash

from common.errors import ProtocolError
from kvtransfer.accepting import accept
from kvtransfer.protocol import RUN_BYTES, DataHeader, decode_header
from kvtransfer.tcp_transport import PREFIX

MAX_HEADER_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 256 << 10
"""At most this much is received at once: the digest then reads it from the cache."""
TURN_BYTES: Final = 1 << 20
"""A connection that is never empty leaves the loop to others after this much."""


class TcpPayload:
    """`Payload` whose bytes are still in the kernel."""

    def __init__(self, stream: "TcpStream", header: DataHeader, num_bytes: int) -> None:
        self.header = header
        self.num_bytes = num_bytes
        self._stream = stream

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        return await self._stream.fill(slabs, self.num_bytes)

    def abandon(self) -> None:
        self._stream.abandon()


class TcpStream:
    """`Stream` of one accepted connection.

    Where the bytes of a read go is decided right before it, so that none ever goes to a slab that
    was abandoned.
    """

    transport = "tcp"

    def __init__(self, connection: socket.socket, block_bytes: int) -> None:
        self._socket = connection
        self._block_bytes = block_bytes
        self._loop = asyncio.get_running_loop()
        self._segments: deque[tuple[memoryview | None, int]] = deque()
        """What comes next: (slab or None, bytes). The first one is being received."""
        self._received = 0
        """Bytes of the first segment that have come."""
        self._scratch = memoryview(b"")
        self._digest = xxhash.xxh3_64()
        self._digests: list[int | None] = []
        self._filled: asyncio.Future[None] | None = None
        """Somebody waits for the segments."""

    # ------------------------------------------------------------ Stream

    async def receive(self) -> TcpPayload:
        header_bytes, body_bytes = PREFIX.unpack(await self._exactly(PREFIX.size))
        limit = max(RUN_BYTES, self._block_bytes)
        if not 0 < header_bytes <= MAX_HEADER_BYTES or body_bytes > limit:
            self.close()  # the stream cannot be followed any more
            raise ProtocolError("a data message of impossible size")
        try:
            header = decode_header(await self._exactly(header_bytes))
        except ProtocolError:
            self.close()
            raise
        return TcpPayload(self, header, body_bytes)

    async def fill(self, slabs: Sequence[memoryview | None], num_bytes: int) -> list[int | None]:
        """Receive a body of `num_bytes` into these slabs; see `Payload.copy`."""
        if slabs:
            self._segments.extend((slab, self._block_bytes) for slab in slabs)
        elif num_bytes:
            self._segments.append((None, num_bytes))
        return await self._fill()

    def abandon(self) -> None:
        self._segments = deque((None, num_bytes) for _, num_bytes in self._segments)

    def close(self) -> None:
        if self._filled is not None:
            self._loop.remove_reader(self._socket)
        self._socket.close()
        self._finish(ConnectionResetError("the data connection was closed"))

    # ------------------------------------------------------------ parts of the above

    async def _exactly(self, num_bytes: int) -> memoryview:
        room = memoryview(bytearray(num_bytes))
        self._segments.append((room, num_bytes))
        await self._fill()
        return room

    async def _fill(self) -> list[int | None]:
        """Receive all segments; returns their digests. Raises ConnectionError."""
        self._digests = []
        self._received = 0
        self._digest.reset()
        self._filled = self._loop.create_future()
        try:
            self._take()
            if not self._filled.done():
                self._loop.add_reader(self._socket, self._take)
                try:
                    await self._filled
                finally:
                    self._loop.remove_reader(self._socket)
            self._filled.result()
        finally:
            self._filled = None
            self._segments.clear()
        return self._digests

    def _take(self) -> None:
        """Receive what is there."""
        turn = 0
        try:
            while self._segments and turn < TURN_BYTES:
                target = self._target()
                count = self._socket.recv_into(target)
                if not count:
                    raise ConnectionResetError("the sender closed the data connection")
                turn += count
                self._came(target[:count])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._finish(error)
            return
        if not self._segments:
            self._finish(None)

    def _target(self) -> memoryview:
        """In the slab, or room for bytes that nobody wants."""
        slab, num_bytes = self._segments[0]
        if slab is not None:
            return slab[self._received : self._received + PIECE_BYTES]
        if not self._scratch:
            self._scratch = memoryview(bytearray(PIECE_BYTES))
        return self._scratch[: num_bytes - self._received]

    def _came(self, piece: memoryview) -> None:
        slab, num_bytes = self._segments[0]
        self._received += len(piece)
        if slab is not None:
            self._digest.update(piece)
        if self._received == num_bytes:
            self._segments.popleft()
            self._digests.append(None if slab is None else self._digest.intdigest())
            self._digest.reset()
            self._received = 0

    def _finish(self, error: OSError | None) -> None:
        if self._filled is None or self._filled.done():
            return
        if error is None:
            self._filled.set_result(None)
        elif isinstance(error, ConnectionError):
            self._filled.set_exception(error)
        else:
            self._filled.set_exception(ConnectionResetError(str(error)))


class TcpListener:
    """`Listener` on a free port. Made by `listen`."""

    def __init__(self, listener: socket.socket, host: str, block_bytes: int) -> None:
        port = listener.getsockname()[1]
        self.address = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
        self._socket = listener
        self._block_bytes = block_bytes

    @classmethod
    async def listen(cls, host: str, block_bytes: int) -> "TcpListener":
        """Raises OSError if `host` cannot be bound."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family)
        listener.setblocking(False)
        return cls(listener, host, block_bytes)

    async def accept(self) -> TcpStream:
        return TcpStream(await accept(self._socket), self._block_bytes)

    def close(self) -> None:
        self._socket.close()
