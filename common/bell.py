"""Waiting for ZMQ sockets without the futures of `zmq.asyncio`; used by `common.line`."""

import asyncio
from collections.abc import Sequence

import zmq


class Bell:
    """Tells a task that there may be something to read in a socket.

    The descriptor of a ZMQ socket speaks up once per change, and not again before somebody looked
    at the socket: whoever looks for another reason (a send does) must call `look`. Many times
    cheaper per message than the futures of `zmq.asyncio`.
    """

    def __init__(self, sockets: Sequence[zmq.SyncSocket]) -> None:
        self._sockets = sockets
        self._rung = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.is_due = False
        """The time that `wake_in` named is over."""
        for socket in sockets:
            self._loop.add_reader(socket.FD, self._on_change, socket)

    def close(self) -> None:
        self.wake_in(None)
        for socket in self._sockets:
            self._loop.remove_reader(socket.FD)

    def look(self, socket: zmq.SyncSocket) -> None:
        if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._rung.set()

    def ring(self) -> None:
        self._rung.set()

    def wake_in(self, seconds: float | None) -> None:
        """Be due after this time, instead of the one that was named before; None: never."""
        if self._timer is not None:
            self._timer.cancel()
        self.is_due = False
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._on_time)

    async def wait(self) -> None:
        """For one task: until it rang since the last call. Others have their turn in any case: who
        reads many messages rings again, and could go on until nothing more comes."""
        if self._rung.is_set():
            await asyncio.sleep(0)
        await self._rung.wait()
        self._rung.clear()

    def _on_time(self) -> None:
        self.is_due = True
        self._rung.set()

    def _on_change(self, socket: zmq.SyncSocket) -> None:
        socket.getsockopt(zmq.EVENTS)  # looked at: else the descriptor would go on speaking
        self._rung.set()
