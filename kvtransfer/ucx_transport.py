"""Data over UCX (RDMA, NVLink, TCP): tag messages, moved by a helper process (`ucx_process`).

The sender's helper reads the pool itself; the receiver's helper writes into rooms that it shares
with the worker, which copies from there into its slots in the pass that digests them. So UCX, whose
receives cannot always be taken back, never holds a slot: one is free as soon as its copy is over.

A helper that ends, or says nothing for long, loses its connections; `UcxListener.accept` then
raises and the endpoint starts another one.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

import msgspec

from common.config import is_loopback
from kvtransfer import ucx_messages as m
from kvtransfer.copying import address_of, copy_blocks
from kvtransfer.memory import BlockMemory
from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import RUN_BYTES, DataHeader, decode_header, encode

log = logging.getLogger("tandem.transfer")

MISSING: Final = "--transport ucx needs the package ucxx-cu12: pip install 'tandem[ucx]'"
START_S: Final = 60.0
MAX_SHIPPING: Final = 4
"""Shipments that one connection may have under way."""
MAX_SILENCE: Final = 20
"""Seconds without a word of the helper, counted while this process runs, until it is ended."""


def is_installed() -> bool:
    return find_spec("ucxx") is not None


class UcxPayload:
    """`Payload` whose bytes lie in a room of the helper."""

    def __init__(self, listener: "UcxListener", header: DataHeader, came: m.Came) -> None:
        self.header = header
        self.num_bytes = came.num_bytes
        self._listener = listener
        self._room = came.room

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        return self._listener.copy(self._room, self.num_bytes, slabs)

    def abandon(self) -> None:
        """The copy is never interrupted."""


class UcxStream:
    """`Stream` of one connection that another worker made."""

    transport = "ucx"

    def __init__(self, listener: "UcxListener", number: int) -> None:
        self._listener = listener
        self._number = number
        self._messages: asyncio.Queue[m.Came | None] = asyncio.Queue()
        self._is_lost = False

    async def receive(self) -> UcxPayload:
        came = None if self._is_lost and self._messages.empty() else await self._messages.get()
        if came is None:
            raise ConnectionResetError("the data connection was lost")
        try:
            return UcxPayload(self._listener, decode_header(came.header), came)
        except BaseException:
            self._listener.free(came.room)
            raise

    def put(self, came: m.Came) -> None:
        self._messages.put_nowait(came)

    def lose(self, reason: str) -> None:
        self._is_lost = True
        self._messages.put_nowait(None)

    def close(self) -> None:
        self._listener.hang_up(self._number)
        while not self._messages.empty():
            came = self._messages.get_nowait()
            if came is not None:
                self._listener.free(came.room)
        self.lose("closed")


class UcxOutlet:
    """`Outlet` of one connection. Made by `UcxListener.connect`.

    Blocks that change while they are read do not land: their digests are made before.
    """

    transport = "ucx"
    reading = None
    in_place = False

    def __init__(self, listener: "UcxListener", number: int, memory: BlockMemory) -> None:
        self._listener = listener
        self._number = number
        self._block_bytes = memory.block_bytes
        self._shipping = 0
        self._is_lost = False
        self._changed = asyncio.Event()
        self.connected: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def writable(self) -> bool:
        return self._shipping < MAX_SHIPPING and not self._is_lost

    def send(self, shipment: Shipment) -> None:
        size = self._block_bytes
        runs = tuple((block * size, count * size) for block, count in shipment.runs)
        self._shipping += 1
        staged = 0 if shipment.staged is None else shipment.staged.nbytes
        ship = m.Ship(self._number, encode(shipment.header), runs, staged)
        try:
            self._listener.tell(ship, shipment.staged)
        except OSError as error:
            log.error("cannot pass blocks to the UCX helper: %s", error)
            self.lose(str(error))

    def abandon(self) -> None:
        """What is read of blocks that have changed fails its digest."""

    async def changed(self) -> bool:
        await self._changed.wait()
        self._changed.clear()
        return not self._is_lost

    def shipped(self) -> None:
        self._shipping -= 1
        self._changed.set()

    def lose(self, reason: str) -> None:
        self._is_lost = True
        self._changed.set()
        if not self.connected.done():
            self.connected.set_exception(ConnectionRefusedError(reason))

    def close(self) -> None:
        self.connected.cancel()
        self._is_lost = True
        self._listener.hang_up(self._number)


class UcxListener:
    """`Listener`, and the helper process of an endpoint: it makes the outlets too."""

    def __init__(self, host: str, memory: BlockMemory) -> None:
        """Starts the helper. Raises OSError if that cannot be."""
        if not is_installed():
            raise OSError(MISSING)
        assert memory.shared is not None, "not offered without a pool that can be mapped"
        self.address = ""
        self._memory = memory
        self._room_bytes = max(RUN_BYTES, memory.block_bytes)
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._peers: dict[int, UcxOutlet | UcxStream] = {}
        self._accepted: asyncio.Queue[UcxStream | None] = asyncio.Queue()
        self._next_number = 0
        self._silence = 0
        self._is_over = False
        self._ready = asyncio.Event()
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        rooms_fd = os.memfd_create("tandem-ucx", os.MFD_CLOEXEC)
        with theirs:
            try:
                os.ftruncate(rooms_fd, m.NUM_ROOMS * self._room_bytes)
                self._rooms = mmap.mmap(rooms_fd, m.NUM_ROOMS * self._room_bytes)
                settings = m.Settings(
                    link_fd=theirs.fileno(),
                    pool_fd=memory.shared.fd,
                    pool_bytes=memory.shared.num_blocks * memory.block_bytes,
                    rooms_fd=rooms_fd,
                    room_bytes=self._room_bytes,
                    is_local=is_loopback(host),
                )
                command = [sys.executable, "-m", "kvtransfer.ucx_process"]
                self._process = subprocess.Popen(
                    [*command, msgspec.json.encode(settings).decode()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(settings.link_fd, settings.pool_fd, rooms_fd),
                )
            except BaseException:
                self._link.close()
                raise
            finally:
                os.close(rooms_fd)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._last_line = "it said nothing"
        os.set_blocking(self._output.fileno(), False)
        self._link.setblocking(False)
        self._loop.add_reader(self._output, self._read_output)
        self._loop.add_reader(self._link, self._read)
        self._watch = self._loop.create_task(self._watch_silence())

    @classmethod
    async def listen(cls, host: str, memory: BlockMemory) -> "UcxListener":
        """Raises OSError if UCX cannot be used here."""
        self = cls(host, memory)
        try:
            async with asyncio.timeout(START_S):
                await self._ready.wait()
            if self._is_over:
                raise OSError(f"UCX cannot be used here: {self._last_line}")
        except BaseException:
            self.close()
            raise
        return self

    async def accept(self) -> UcxStream:
        """Raises ConnectionResetError when the helper has ended."""
        stream = None if self._is_over else await self._accepted.get()
        if stream is None:
            raise ConnectionResetError(f"the UCX helper ended: {self._last_line}")
        return stream

    async def connect(self, address: str, memory: BlockMemory) -> UcxOutlet:
        """Raises OSError."""
        if self._is_over:
            raise ConnectionRefusedError("the UCX helper is being started again")
        number = self._next_number
        self._next_number += 2
        outlet = self._peers[number] = UcxOutlet(self, number, memory)
        try:
            self.tell(m.Connect(number, address))
            way = await outlet.connected
        except BaseException:
            outlet.close()
            raise
        log.debug("UCX to %s goes over %s", address, way)
        return outlet

    def close(self) -> None:
        """Ends the helper: from here on nothing of it is read or written."""
        self._end("the endpoint was closed")
        self._process.kill()
        self._process.wait()
        self._read_output()
        self._output.close()
        self._rooms.close()

    # ------------------------------------------------------------ for streams and outlets

    def tell(self, message: m.ToHelper, staged: memoryview | None = None) -> None:
        """`staged`: bytes that travel with a Ship, copied before this returns. Raises OSError where
        there is no memory, or no descriptor, for them."""
        if self._is_over:
            return
        fds = [] if staged is None else [memory_of(staged)]
        self._unsent.append((m.encode(message), fds))
        if len(self._unsent) == 1:
            self._write()

    def free(self, room: int) -> None:
        if room >= 0:
            self.tell(m.Free(room))

    def hang_up(self, number: int) -> None:
        if self._peers.pop(number, None) is not None:
            self.tell(m.HangUp(number))

    def copy(self, room: int, size: int, slabs: Sequence[memoryview | None]) -> list[int | None]:
        """See `Payload.copy`; the room is free afterwards."""
        digests: list[int | None] = []
        try:
            if slabs and not self._rooms.closed:
                block_bytes = self._memory.block_bytes
                start = room * self._room_bytes
                with memoryview(self._rooms) as rooms, rooms[start : start + size] as there:
                    offsets = range(0, size, block_bytes)
                    digests = copy_blocks(there, address_of(there), offsets, slabs, block_bytes)
        finally:
            self.free(room)
        return digests or [None] * len(slabs)

    # ------------------------------------------------------------ the helper

    def _read(self) -> None:
        while not self._is_over:
            try:
                data = self._link.recv(m.MAX_PACKET_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self._end("the helper ended")
                return
            self._silence = 0
            self._hear(m.decode_from_helper.decode(data))

    def _hear(self, message: m.FromHelper) -> None:
        if isinstance(message, m.Ready):
            self.address = message.address
            self._ready.set()
            return
        if isinstance(message, m.Alive):
            return
        peer = self._peers.get(message.number)
        if isinstance(message, m.Connected) and message.number % 2:
            stream = self._peers[message.number] = UcxStream(self, message.number)
            self._accepted.put_nowait(stream)
        elif isinstance(message, m.Came):
            if isinstance(peer, UcxStream):
                peer.put(message)
            else:
                self.free(message.room)
        elif isinstance(message, m.Lost):
            if peer is not None:
                del self._peers[message.number]
                peer.lose(message.reason)
        elif isinstance(peer, UcxOutlet):
            if isinstance(message, m.Shipped):
                peer.shipped()
            elif not peer.connected.done():
                peer.connected.set_result(message.way)

    def _write(self) -> None:
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                socket.send_fds(self._link, [data], fds)
                self._unsent.popleft()
                close_all(fds)
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._link, self._write)
            return
        except OSError:
            self._end("the helper ended")
            return
        self._loop.remove_writer(self._link)

    def _end(self, reason: str) -> None:
        """Lose every connection, once."""
        if self._is_over:
            return
        self._is_over = True
        self._watch.cancel()
        self._loop.remove_reader(self._link)
        self._loop.remove_writer(self._link)
        self._link.close()
        for _, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
        self._read_output()
        self._loop.remove_reader(self._output)
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.lose(reason)
        self._accepted.put_nowait(None)
        self._ready.set()

    def _read_output(self) -> None:
        """What UCX complains about; read at once so that the helper never waits for us."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output.fileno(), 1 << 16):
                for line in data.decode(errors="replace").splitlines():
                    if line.strip():
                        self._last_line = line.strip()
                        log.debug("UCX helper: %s", line)
            self._loop.remove_reader(self._output)  # its end

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(m.ALIVE_S)
            if self._ready.is_set():
                self._silence += 1
                if self._silence > MAX_SILENCE:
                    self._process.kill()
                    self._last_line = "it did not move any more"
                    return


def memory_of(staged: memoryview) -> int:
    """A descriptor of memory with these bytes. Raises OSError."""
    fd = os.memfd_create("tandem-ucx", os.MFD_CLOEXEC)
    left = staged
    try:
        while left:
            left = left[os.write(fd, left) :]
    except OSError:
        os.close(fd)
        raise
    return fd


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
