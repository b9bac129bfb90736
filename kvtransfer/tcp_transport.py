"""Data over TCP: a prefix (bytes of header and body), the header, the bytes of its blocks.

The sender hands runs of the pool to the kernel; the receiver has the kernel write straight into
the slots that were granted, and digests each piece while it is in the cache.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import xxhash

from common.errors import ProtocolError
from kvtransfer.memory import BlockMemory
from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import RUN_BYTES, DataHeader, decode_header, encode

PREFIX: Final = struct.Struct("<II")
MAX_HEADER_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 256 << 10
"""At most this much is received at once: the digest then reads it from the cache."""
MAX_VECTORS: Final = 256
_ZEROS: Final = memoryview(bytes(1 << 20))


class TcpOutlet:
    """`Outlet` over a non-blocking socket. Made by `connect`."""

    transport = "tcp"

    def __init__(self, connection: socket.socket, memory: BlockMemory) -> None:
        self._socket = connection
        self._memory = memory
        self._loop = asyncio.get_running_loop()
        self._transfer: int | None = None
        self._head = memoryview(b"")
        self._body: deque[memoryview] = deque()
        self._is_lost = False
        self._is_waiting = False
        self._changed = asyncio.Event()
        # The receiver says nothing here: what can be read is the end of the connection.
        self._loop.add_reader(connection, self._lose)

    @classmethod
    async def connect(cls, address: str, memory: BlockMemory) -> "TcpOutlet":
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        host, port = split_address(address)
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, target = found[0]
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(connection, target)
        except BaseException:
            connection.close()
            raise
        return cls(connection, memory)

    @property
    def reading(self) -> int | None:
        return self._transfer

    def writable(self) -> bool:
        return not (self._head or self._body or self._is_lost)

    def send(self, shipment: Shipment) -> None:
        assert self.writable(), "the shipment before is still on its way"
        self._transfer = shipment.header.transfer
        header = encode(shipment.header)
        runs = [self._memory.run(block, count) for block, count in shipment.runs]
        prefix = PREFIX.pack(len(header), sum(run.nbytes for run in runs))
        self._head = memoryview(prefix + header)
        self._body = deque(runs)
        self._push()

    def abandon(self) -> None:
        """The receiver still gets as many bytes as the header says, and will not use them."""
        left = sum(view.nbytes for view in self._body)
        self._body.clear()
        while left > 0:
            self._body.append(_ZEROS[:left])
            left -= self._body[-1].nbytes
        self._transfer = None

    async def changed(self) -> bool:
        await self._changed.wait()
        self._changed.clear()
        return not self._is_lost

    def close(self) -> None:
        self._stop_waiting()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._is_lost = True
        self._body.clear()

    def _push(self) -> None:
        """Give the kernel what it takes."""
        try:
            while self._head or self._body:
                views = [self._body[i] for i in range(min(len(self._body), MAX_VECTORS))]
                self._advance(self._socket.sendmsg([self._head, *views]))
        except BlockingIOError:
            if not self._is_waiting:
                self._loop.add_writer(self._socket, self._push)
                self._is_waiting = True
            return
        except OSError:
            self._lose()
            return
        self._stop_waiting()
        self._transfer = None
        self._changed.set()

    def _advance(self, sent: int) -> None:
        in_head = min(sent, len(self._head))
        self._head = self._head[in_head:]
        sent -= in_head
        while sent > 0:
            view = self._body.popleft()
            if sent < view.nbytes:
                self._body.appendleft(view[sent:])
            sent -= view.nbytes

    def _lose(self) -> None:
        self._is_lost = True
        self._transfer = None
        self._body.clear()
        self._stop_waiting()
        self._loop.remove_reader(self._socket)
        self._changed.set()

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._loop.remove_writer(self._socket)
            self._is_waiting = False


class TcpPayload:
    """`Payload` whose bytes are still in the kernel."""

    def __init__(self, stream: "TcpStream", header: DataHeader, num_bytes: int) -> None:
        self.header = header
        self.num_bytes = num_bytes
        self._stream = stream

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        return await self._stream.fill(slabs)

    def abandon(self) -> None:
        self._stream.abandon()


class TcpStream(asyncio.BufferedProtocol):
    """`Stream` of one accepted connection.

    PREFIX -> HEADER -> (paused until `fill`) -> BODY -> PREFIX

    The event loop asks for the buffer of each read right before it reads, so that no read ever
    goes to a slab that was abandoned.
    """

    transport = "tcp"

    def __init__(self, listener: "TcpListener", block_bytes: int) -> None:
        self._listener = listener
        self._block_bytes = block_bytes
        self._connection: asyncio.Transport | None = None
        self._is_lost = False
        self._malformed = ""
        self._changed = asyncio.Event()
        """A header or a body is complete, or the connection was lost."""
        self._prefix = memoryview(bytearray(PREFIX.size))
        self._target = self._prefix
        """Where the next bytes go."""
        self._head: memoryview | None = None
        self._header: DataHeader | None = None
        self._body_bytes = 0
        self._left = 0
        """Bytes of the body that have not come."""
        self._segments: deque[tuple[memoryview | None, int]] = deque()
        """What the body is made of: (slab or None, bytes). The first one is being received."""
        self._received = 0
        """Bytes of the first segment that have come."""
        self._scratch = memoryview(b"")
        self._digest = xxhash.xxh3_64()
        self._digests: list[int | None] = []

    # ------------------------------------------------------------ Stream

    async def receive(self) -> TcpPayload:
        while self._header is None:
            if self._malformed:
                error, self._malformed = self._malformed, ""
                raise ProtocolError(error)
            await self._wait()
        header, self._header = self._header, None
        return TcpPayload(self, header, self._body_bytes)

    async def fill(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        """Receive the body into these slabs; see `Payload.copy`."""
        assert self._connection is not None and self._left == 0, self._left
        self._digests = []
        self._left = self._body_bytes
        if slabs:
            self._segments = deque((slab, self._block_bytes) for slab in slabs)
        else:
            self._segments = deque([(None, self._left)])
        self._begin_segment()
        self._connection.resume_reading()
        while self._left:
            await self._wait()
        return self._digests

    def abandon(self) -> None:
        self._segments = deque((None, num_bytes) for _, num_bytes in self._segments)
        if self._left:
            self._aim()

    def close(self) -> None:
        self._is_lost = True
        self._changed.set()
        if self._connection is not None:
            self._connection.abort()

    async def _wait(self) -> None:
        if self._is_lost:
            raise ConnectionResetError("the data connection was lost")
        await self._changed.wait()
        self._changed.clear()

    # ------------------------------------------------------------ BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), transport
        self._connection = transport
        self._listener.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._changed.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[:PIECE_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        received, self._target = self._target[:nbytes], self._target[nbytes:]
        if self._left:
            self._body_came(received)
        elif not self._target:
            self._head_came()

    # ------------------------------------------------------------ parts of the above

    def _head_came(self) -> None:
        """The prefix or the header is complete."""
        if self._head is None:
            header_bytes, self._body_bytes = PREFIX.unpack(self._prefix)
            limit = max(RUN_BYTES, self._block_bytes)
            if not 0 < header_bytes <= MAX_HEADER_BYTES or self._body_bytes > limit:
                self._refuse("a data message of impossible size")
                return
            self._head = self._target = memoryview(bytearray(header_bytes))
            return
        try:
            self._header = decode_header(self._head)
        except ProtocolError as error:
            self._refuse(str(error))
            return
        assert self._connection is not None
        self._connection.pause_reading()
        self._changed.set()

    def _body_came(self, received: memoryview) -> None:
        slab, num_bytes = self._segments[0]
        self._left -= len(received)
        self._received += len(received)
        if slab is not None:
            self._digest.update(received)
        if self._received == num_bytes:
            self._segments.popleft()
            self._digests.append(None if slab is None else self._digest.intdigest())
            self._begin_segment()
            if not self._left:
                self._changed.set()
        elif not self._target:
            self._aim()

    def _begin_segment(self) -> None:
        """Go on with the next block of the body, or with the next message."""
        self._received = 0
        if self._left:
            self._digest.reset()
            self._aim()
        else:
            self._head = None
            self._target = self._prefix

    def _aim(self) -> None:
        """Receive into the slab, or into room for bytes that nobody wants."""
        slab, num_bytes = self._segments[0]
        if slab is not None:
            self._target = slab[self._received :]
            return
        if not self._scratch:
            self._scratch = memoryview(bytearray(PIECE_BYTES))
        self._target = self._scratch[: num_bytes - self._received]

    def _refuse(self, reason: str) -> None:
        """The stream cannot be followed any more."""
        self._malformed = reason
        self.close()


class TcpListener:
    """`Listener` on a free port. Made by `listen`."""

    def __init__(self) -> None:
        self.address = ""
        self._accepted: asyncio.Queue[TcpStream] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self._is_closed = False

    @classmethod
    async def listen(cls, host: str, block_bytes: int) -> "TcpListener":
        """Raises OSError if `host` cannot be bound."""
        self = cls()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: TcpStream(self, block_bytes), host, 0
        )
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
        return self

    async def accept(self) -> TcpStream:
        return await self._accepted.get()

    def made(self, stream: TcpStream) -> None:
        """A connection is up. It may have been under way when the listener was closed."""
        if self._is_closed:
            stream.close()
        else:
            self._accepted.put_nowait(stream)

    def close(self) -> None:
        self._is_closed = True
        if self._server is not None:
            self._server.close()
        while not self._accepted.empty():
            self._accepted.get_nowait().close()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`. Raises OSError if it is no such address."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise OSError(f"{address!r} is no address: {error}") from error
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise OSError(f"{address!r} is no address of the form tcp://host:port")
    return parts.hostname, port
