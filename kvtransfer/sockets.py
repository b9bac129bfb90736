"""zmq sockets in an asyncio loop: sending without waiting, and watching one connection.

Used for control links by `Endpoint` and for data by `zmq_transport`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message


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
    """A DEALER that queues only while it is connected: messages for a lost connection are
    dropped, not kept for the next one."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    return socket


class LinkMonitor:
    """Tells when the one connection of a DEALER comes up or is lost. Made before it connects."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )

    async def changed(self) -> bool:
        """Wait for the next change: True is up, False is lost."""
        while True:
            message = await recv_monitor_message(self._monitor)
            if message["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            if message["event"] == zmq.EVENT_DISCONNECTED:
                return False

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
