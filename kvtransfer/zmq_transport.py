"""Data over zmq: a header frame, then one frame with the blocks of the message.

The sender copies its frames into rooms of its own before they are sent, so that the pool may be
reused at once; the receiver copies from zmq's memory into its slots.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
import zmq
import zmq.asyncio

from common.curve import Caller, CurveKeys
from common.errors import ProtocolError
from kvtransfer.copying import address_of, copy_blocks
from kvtransfer.memory import BlockMemory
from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import RUN_BYTES, WINDOW_BYTES, DataHeader, decode_header, encode
from kvtransfer.sockets import LinkMonitor, is_writable, make_dealer, send_now

_MAX_QUEUED = 64
"""Messages of at most RUN_BYTES that wait at either end; the window keeps them fewer."""
_MAX_ROOMS = WINDOW_BYTES // RUN_BYTES


class Room:
    """Memory of one message, used again when zmq has let go of it: new memory for each message
    would cost more than the copy."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = np.empty(num_bytes, dtype=np.uint8)
        self._sent: zmq.MessageTracker | None = None

    def is_free(self, num_bytes: int) -> bool:
        return self._bytes.nbytes >= num_bytes and (self._sent is None or self._sent.done)

    def frame(self, runs: Sequence[memoryview]) -> zmq.Frame:
        """One frame of the bytes of these runs; the room is not free until it is gone."""
        end = 0
        for run in runs:
            start, end = end, end + run.nbytes
            np.copyto(self._bytes[start:end], np.frombuffer(run, dtype=np.uint8))
        frame = zmq.Frame(self._bytes[:end].data, track=True, copy=False)
        self._sent = frame.tracker
        return frame


class ZmqOutlet:
    """`Outlet` over a DEALER socket. Made by `connect`."""

    transport = "zmq"
    reading = None
    in_place = False

    def __init__(self, context: zmq.asyncio.Context, memory: BlockMemory, caller: Caller) -> None:
        """Raises zmq.ZMQError where no more sockets can be had."""
        self._memory = memory
        self._rooms: list[Room] = []
        self._socket = make_dealer(context)
        try:
            caller.prepare(self._socket)
            self._socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
            self._monitor = LinkMonitor(context, self._socket)
        except BaseException:
            self._socket.close(linger=0)
            raise

    @classmethod
    async def connect(
        cls, context: zmq.asyncio.Context, address: str, memory: BlockMemory, caller: Caller
    ) -> "ZmqOutlet":
        """Raises OSError for an address that is none, or where no more sockets can be had; waits
        for ever where nobody answers."""
        try:
            self = cls(context, memory, caller)
            try:
                self._socket.connect(address)
                while not await self._monitor.changed():
                    pass
            except BaseException:
                self.close()
                raise
        except zmq.ZMQError as error:
            raise OSError(f"{address!r}: {error}") from error
        return self

    def writable(self) -> bool:
        return is_writable(self._socket)

    def send(self, shipment: Shipment) -> None:
        frames: list[bytes | memoryview | zmq.Frame] = [encode(shipment.header)]
        runs = shipment.parts(self._memory)
        if shipment.staged is not None:
            # Memory of this message alone: zmq holds it until it is sent.
            frames.append(zmq.Frame(shipment.staged, copy=False))
        elif runs:
            room = self._room(sum(run.nbytes for run in runs))
            # Without a room zmq copies the runs into memory that it takes for them.
            frames += [room.frame(runs)] if room is not None else runs
        # A connection that was lost after `writable` is reported by the monitor.
        send_now(self._socket, frames)

    def _room(self, num_bytes: int) -> Room | None:
        """Where so many bytes can be put; None if all rooms are still being sent."""
        room = next((room for room in self._rooms if room.is_free(num_bytes)), None)
        if room is None and len(self._rooms) < _MAX_ROOMS:
            room = Room(max(RUN_BYTES, self._memory.block_bytes))
            self._rooms.append(room)
        return room

    def abandon(self) -> None:
        """Nothing is read after `send`."""

    async def changed(self) -> bool:
        return await self._monitor.changed()

    def close(self) -> None:
        self._monitor.close()
        self._socket.close(linger=0)


class ZmqPayload:
    """`Payload` whose bytes lie in zmq's memory."""

    def __init__(self, header: DataHeader, frames: Sequence[memoryview], block_bytes: int) -> None:
        self.header = header
        self.num_bytes = sum(frame.nbytes for frame in frames)
        self._frames = frames
        self._block_bytes = block_bytes

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        digests: list[int | None] = []
        for frame in self._frames if slabs else ():
            offsets = range(0, len(frame), self._block_bytes)
            part = slabs[len(digests) : len(digests) + len(offsets)]
            digests += copy_blocks(frame, address_of(frame), offsets, part, self._block_bytes)
        return digests

    def abandon(self) -> None:
        """The copy is never interrupted."""


class ZmqStream:
    """`Stream` over the ROUTER socket that all senders share; they prove themselves by the
    ticket's secret."""

    transport = "zmq"

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        memory: BlockMemory,
        keys: CurveKeys | None,
    ) -> None:
        """Binds `address`, which may name any free port. Raises zmq.ZMQError if it cannot be."""
        self._memory = memory
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(RUN_BYTES, memory.block_bytes))
        if keys is not None:
            keys.listen(self._socket)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def receive(self) -> ZmqPayload:
        _, *frames = await self._socket.recv_multipart(copy=False)
        if not frames:
            raise ProtocolError("data message without a header")
        header = decode_header(frames[0].buffer)
        buffers = [frame.buffer for frame in frames[1:]]
        if any(buffer.nbytes % self._memory.block_bytes for buffer in buffers):
            raise ProtocolError("a frame that is no whole number of blocks")
        return ZmqPayload(header, buffers, self._memory.block_bytes)

    def close(self) -> None:
        self._socket.close(linger=0)


class ZmqListener:
    """`Listener` whose one stream has the data of all senders."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        memory: BlockMemory,
        keys: CurveKeys | None,
    ) -> None:
        """Raises zmq.ZMQError if `address` (`tcp://host:*`: a free port) cannot be bound."""
        self._stream = ZmqStream(context, address, memory, keys)
        self._is_taken = False
        self.address = self._stream.address

    async def accept(self) -> ZmqStream:
        if self._is_taken:
            await asyncio.Event().wait()  # for ever
        self._is_taken = True
        return self._stream

    def close(self) -> None:
        self._stream.close()
