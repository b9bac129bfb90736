"""zmq sockets in an asyncio loop: sending without waiting, and watching one connection.

Used for control links by `Endpoint` and for data by `zmq_transport`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

_POLLIN: Final = int(zmq.POLLIN)
_DONTWAIT: Final = int(zmq.DONTWAIT)
_SNDMORE: Final = int(zmq.SNDMORE)
READS: Final = 64
"""A control socket that is never empty leaves the loop to others after so many messages."""


def send_now(socket: zmq.asyncio.Socket, frames: Sequence[bytes | memoryview | zmq.Frame]) -> int:
    """Send a message or drop it. Returns 0, or the errno for which it was dropped."""
    # Reading EVENTS lets the socket learn of connections that came up this very moment.
    socket.get(zmq.EVENTS)
    sent = cast("asyncio.Future[Any]", socket.send_multipart(frames, flags=zmq.DONTWAIT))
    error = sent.exception()
    if error is None:
        return 0
    if not isinstance(error, zmq.ZMQError):
        raise error
    return int(error.errno or 0)


def is_writable(socket: zmq.asyncio.Socket) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLOUT)


def make_dealer(context: zmq.asyncio.Context) -> zmq.asyncio.Socket:
    """A DEALER as `prepare_dealer` makes it."""
    socket = context.socket(zmq.DEALER)
    prepare_dealer(socket)
    return socket


def prepare_dealer(socket: "zmq.asyncio.Socket | zmq.Socket[bytes]") -> None:
    """Queue only while it is connected: messages for a lost connection are dropped, not kept for
    the next one."""
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)


class ControlSocket:
    """A zmq socket of control messages in the running loop: read and written without a future for
    each message, which would cost more than everything else that is done with it.

    What tells the loop of new messages is an edge that any look at the socket takes away. So
    whoever looks also says whether there are messages.
    """

    def __init__(self, context: zmq.asyncio.Context, kind: int) -> None:
        self.plain: zmq.Socket[bytes] = zmq.Context.shadow(context).socket(kind)
        self._loop = asyncio.get_running_loop()
        self._fd: int = self.plain.getsockopt(zmq.FD)
        self._is_ready = asyncio.Event()
        self._read = 0
        self._loop.add_reader(self._fd, self._is_ready.set)

    async def receive(self) -> list[bytes]:
        """The frames of the next message."""
        self._read += 1
        if self._read % READS == 0:
            await asyncio.sleep(0)
        while not self._events() & _POLLIN:
            self._is_ready.clear()
            await self._is_ready.wait()
        frames: list[bytes] = []
        has_more = True
        while has_more:
            frame = self.plain.recv(_DONTWAIT, copy=False)
            frames.append(frame.bytes)
            has_more = frame.more
        return frames

    def send(self, frames: Sequence[bytes]) -> int:
        """Send a message or drop it. Returns 0, or the errno for which it was dropped."""
        error = self._send(frames)
        if error:
            self._events()  # so that connections of this very moment are known
            error = self._send(frames)
        if self._events() & _POLLIN:
            self._is_ready.set()
        return error

    def _send(self, frames: Sequence[bytes]) -> int:
        """Returns 0 or an errno. What refuses a message does so at its first frame."""
        try:
            for frame in frames[:-1]:
                self.plain.send(frame, _DONTWAIT | _SNDMORE)
            self.plain.send(frames[-1], _DONTWAIT)
        except zmq.ZMQError as failure:
            return int(failure.errno or 0)
        return 0

    def close(self, linger: int) -> None:
        self._loop.remove_reader(self._fd)
        self.plain.close(linger=linger)

    def _events(self) -> int:
        return int(self.plain.getsockopt(zmq.EVENTS))


class LinkMonitor:
    """Tells when the one connection of a DEALER comes up or is lost. Made before it connects."""

    def __init__(
        self, context: zmq.asyncio.Context, socket: "zmq.asyncio.Socket | zmq.Socket[bytes]"
    ) -> None:
        """`context`: of the socket. Raises zmq.ZMQError where no more sockets can be had."""
        self._socket = socket
        # Not of `get_monitor_socket`, which for a plain socket is plain: to await it would take a
        # second one on the same handle, and libzmq does not bear a handle that is closed twice.
        self._monitor: zmq.asyncio.Socket = context.socket(zmq.PAIR)
        try:
            address = f"inproc://monitor-{int(socket.getsockopt(zmq.FD))}"
            socket.monitor(address, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            self._monitor.connect(address)
        except BaseException:
            self.close()
            raise

    async def changed(self) -> bool:
        """Wait for the next change: True is up, False is lost."""
        while True:
            message = await cast("Any", recv_monitor_message(self._monitor))
            if message["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            if message["event"] == zmq.EVENT_DISCONNECTED:
                return False

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
