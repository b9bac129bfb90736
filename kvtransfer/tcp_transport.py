"""Data over TCP: a prefix (bytes of header and body), the header, the bytes of its blocks.

This file has the sender, which hands runs of the pool to the kernel; the receiver is in
`tcp_stream`.
"""

import asyncio
import socket
import struct
from collections import deque
from typing import Final
from urllib.parse import urlsplit

from kvtransfer.memory import BlockMemory
from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import encode

PREFIX: Final = struct.Struct("<II")
MAX_VECTORS: Final = 256
_ZEROS: Final = memoryview(bytes(1 << 20))


class TcpOutlet:
    """`Outlet` over a non-blocking socket. Made by `connect`."""

    transport = "tcp"
    in_place = False

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
        runs = shipment.parts(self._memory)
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
        self._transfer = None
        if self._is_waiting:
            self._stop_waiting()
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
