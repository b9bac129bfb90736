"""Data through shared memory: the receiver maps the sender's pool and copies out of it.

Headers travel over a Unix socket in the abstract namespace (nothing to clean up, and it ends with
its process); the first message brings the descriptor of the pool. The receiver answers with a
nonce that only the memory holds: so the sender knows that this way really works.

The sender does not wait for the copies: it raises the generation of a block before writing it
anew, and the receiver believes a copy only if the generation was the offered one before and after.
"""

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from common.errors import ProtocolError
from common.kv.shared import NONCE_BYTES, PeerBlocks
from common.messages import KvLayoutInfo
from kvtransfer.accepting import accept, readable
from kvtransfer.copying import copy_blocks, gather_blocks
from kvtransfer.cutting import Cutting, Piece
from kvtransfer.memory import BlockMemory
from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import (
    SharedBlock,
    SharedHeader,
    SharedPool,
    Wire,
    decode_shared_header,
    decode_shared_pool,
    encode,
)

MAX_MESSAGE_BYTES: Final = 160 << 10
"""More than a header of RUN_BLOCKS blocks takes, less than a socket buffer of the kernel."""
_SCHEME: Final = "unix:@"
_CREDENTIALS: Final = struct.Struct("3i")


class ShmOutlet:
    """`Outlet` that sends headers alone. Made by `connect`."""

    transport = "shm"
    reading = None
    in_place = True

    def __init__(self, connection: socket.socket, memory: BlockMemory) -> None:
        assert memory.shared is not None
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._generations = memory.shared.generations
        self._unsent: bytes | None = None
        self._is_waiting = False
        self._is_lost = False
        self._changed = asyncio.Event()
        # The receiver says nothing more: what can be read is the end of the connection.
        self._loop.add_reader(connection, self._lose)

    @classmethod
    async def connect(cls, address: str, memory: BlockMemory, block_size: int) -> "ShmOutlet":
        """Raises OSError, also if the receiver has not mapped the pool."""
        shared = memory.shared
        assert shared is not None
        if not address.startswith(_SCHEME):
            raise OSError(f"{address!r} is no address of the form {_SCHEME}name")
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, "\0" + address.removeprefix(_SCHEME))
            check_user(connection)
            pool = encode(SharedPool(shared.num_blocks, shared.block_bytes, block_size))
            socket.send_fds(connection, [pool], [shared.fd])
            nonce = await loop.sock_recv(connection, NONCE_BYTES)
            if not secrets.compare_digest(nonce, shared.nonce):
                raise OSError("the receiver did not map the pool")
        except BaseException:
            connection.close()
            raise
        return cls(connection, memory)

    def writable(self) -> bool:
        return self._unsent is None and not self._is_lost

    def send(self, shipment: Shipment) -> None:
        assert self.writable(), "the shipment before is still on its way"
        sources = [
            SharedBlock(block, self._generations[block])
            for start, count in shipment.runs
            for block in range(start, start + count)
        ]
        sources += [
            SharedBlock(block, self._generations[block] if block >= 0 else 0, unit)
            for block, unit in shipment.pieces
        ]
        self._unsent = encode(SharedHeader(shipment.header, tuple(sources)))
        self._push()

    def abandon(self) -> None:
        """The generations protect what the receiver may still read."""

    async def changed(self) -> bool:
        await self._changed.wait()
        self._changed.clear()
        return not self._is_lost

    def close(self) -> None:
        self._lose()
        self._socket.close()

    def _push(self) -> None:
        assert self._unsent is not None
        try:
            self._socket.send(self._unsent)
        except BlockingIOError:
            if not self._is_waiting:
                self._loop.add_writer(self._socket, self._push)
                self._is_waiting = True
            return
        except OSError:
            self._lose()
            return
        self._unsent = None
        if self._is_waiting:
            self._loop.remove_writer(self._socket)
            self._is_waiting = False
            self._changed.set()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._changed.set()


class ShmPayload:
    """`Payload` whose bytes lie in the sender's pool."""

    def __init__(self, message: SharedHeader, blocks: PeerBlocks, cutting: Cutting) -> None:
        self.header = message.header
        self.num_bytes = len(message.header.blocks) * cutting.block_bytes
        self._sources = message.sources
        self._blocks = blocks
        self._cutting = cutting

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        """Blocks that the sender wrote anew, before or meanwhile, have no digest."""
        if not slabs:
            return []
        current = [slab if ok else None for slab, ok in zip(slabs, self._offered(), strict=True)]
        pool, cutting = self._blocks, self._cutting
        if cutting.is_whole:
            size = cutting.block_bytes
            offsets = [source.block * size for source in self._sources]
            digests = copy_blocks(pool.memory, pool.address, offsets, current, size)
        else:
            pieces = [Piece(source.block, source.unit) for source in self._sources]
            digests = gather_blocks(cutting, pool.slab, pool.address, pieces, current)
        return [found if ok else None for found, ok in zip(digests, self._offered(), strict=True)]

    def _offered(self) -> list[bool]:
        """Of each block, whether it is still what was offered."""
        generation = self._blocks.generation
        same = [
            source.block < 0 or generation(source.block) == source.generation
            for source in self._sources
        ]
        each = len(same) // max(1, len(self.header.blocks))
        return [all(same[i : i + each]) for i in range(0, len(same), each)] if each else []

    def abandon(self) -> None:
        """The copy is never interrupted."""


class ShmStream:
    """`Stream` of one accepted connection; the pool is mapped by the first `receive`."""

    transport = "shm"

    def __init__(self, connection: socket.socket, block_bytes: int, layout: KvLayoutInfo) -> None:
        self._socket = connection
        self._block_bytes = block_bytes
        self._layout = layout
        self._blocks: PeerBlocks | None = None
        self._cutting: Cutting | None = None
        self._has_met = False

    async def receive(self) -> ShmPayload:
        try:
            if not self._has_met:
                self._has_met = True
                await self._meet()
            if self._blocks is None or self._cutting is None:
                raise ConnectionResetError("the sender shared no pool")
            loop = asyncio.get_running_loop()
            data = await loop.sock_recv(self._socket, MAX_MESSAGE_BYTES)
        except OSError as error:
            raise ConnectionResetError(str(error)) from error
        if not data:
            raise ConnectionResetError("the sender closed the connection")
        message = decode_shared_header(data)
        self._check(message, self._blocks.num_blocks, self._cutting)
        return ShmPayload(message, self._blocks, self._cutting)

    @staticmethod
    def _check(message: SharedHeader, num_blocks: int, cutting: Cutting) -> None:
        """Raises ProtocolError for sources that lie outside of the sender's pool."""
        is_cut = not cutting.is_whole
        each = cutting.pieces if is_cut else 1
        units, first = (cutting.units, -1) if is_cut else (1, 0)
        if len(message.sources) != each * len(message.header.blocks):
            raise ProtocolError(
                f"{len(message.sources)} sources of {len(message.header.blocks)} blocks"
            )
        for source in message.sources:
            if not (first <= source.block < num_blocks and 0 <= source.unit < units):
                raise ProtocolError("a block that is not in the sender's pool")

    def close(self) -> None:
        self._socket.close()
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    async def _meet(self) -> None:
        """Map the sender's pool and prove it. Raises OSError, ProtocolError."""
        check_user(self._socket)
        await readable(self._socket)
        data, descriptors, _, _ = socket.recv_fds(
            self._socket, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not data:
                raise ConnectionResetError("the sender closed the connection")
            pool = decode_shared_pool(data)
            layout = replace(self._layout, block_size=pool.block_size)
            cutting = Cutting.of(layout, pool.block_bytes, Wire.of(self._layout))
            if len(descriptors) != 1 or cutting.block_bytes != self._block_bytes:
                raise ProtocolError(f"{len(descriptors)} descriptors for {pool}")
            self._cutting = cutting
            self._blocks = PeerBlocks(descriptors[0], pool.num_blocks, pool.block_bytes)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._socket.send(self._blocks.nonce)


class ShmListener:
    """`Listener` on a socket without a name in any file system."""

    def __init__(self, block_bytes: int, layout: KvLayoutInfo) -> None:
        """`layout`: of the blocks that come in. Raises OSError where there are no such sockets."""
        self._block_bytes = block_bytes
        self._layout = layout
        name = f"tandem-kv-{secrets.token_hex(8)}"
        self.address = _SCHEME + name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            self._socket.bind("\0" + name)
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise

    async def accept(self) -> ShmStream:
        return ShmStream(await accept(self._socket), self._block_bytes, self._layout)

    def close(self) -> None:
        self._socket.close()


def check_user(connection: socket.socket) -> None:
    """The abstract namespace has no permissions, and the pool holds the prompts of users. Raises
    PermissionError if a process of another user is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise PermissionError(f"the other end of the Unix socket belongs to user {uid}")
