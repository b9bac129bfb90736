"""The router-worker link over ZMQ: `WorkerLink` (one bound ROUTER) and `RouterLink` (one DEALER
per worker).

The link, not the registry, says who is alive. Each connection has its own random identity: what
a router lost with one connection (its attempts on that worker) never mixes with what it sends
over the next. Used in the asyncio loop of the worker's I/O thread and of the router.
"""

import asyncio
import logging
import time
from contextlib import aclosing
from typing import Final, cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common.config import TimerConfig
from common.curve import CurveKeys, Gate
from common.errors import ConfigError, ProtocolError
from common.line import QUEUE, Down, Line, LinkEvent, Message, Up, limit, try_send
from common.messages import (
    Attach,
    Attached,
    ToRouter,
    ToWorker,
    WorkerInfo,
    decode_for_worker,
    encode,
)

__all__ = ["Down", "LinkEvent", "Message", "RouterLink", "Up", "WorkerLink"]

log = logging.getLogger(__name__)

LINGER_MS: Final = 1000
"""How long `WorkerLink.close` waits for the routers to take what was said last."""


class WorkerLink:
    """The worker's end. A router is known from its Attach until `silent` has reported it.

    Attach is answered here with the information of `set_info`; all else, Ping too, goes to the
    owner. `malformed`, `unattached` and `undelivered` count what was dropped.
    """

    def __init__(self, host: str, timers: TimerConfig, keys: CurveKeys | None = None) -> None:
        """With `keys`, only routers with an allowed key get in."""
        self._host = f"[{host}]" if ":" in host else host
        self._keys = keys
        self._gate: Gate | None = None
        self._info: WorkerInfo | None = None
        self._context = zmq.Context()
        self._socket = zmq.asyncio.Context.shadow(self._context).socket(zmq.ROUTER)
        limit(self._socket, timers.heartbeat_s, timers.router_silence_s)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor = self._context.socket(zmq.PAIR)
        self._heard: dict[bytes, float] = {}
        self._routers: dict[int, bytes] = {}
        """File descriptor of a connection -> router, the only name that a close event has."""
        self._lost: list[bytes] = []
        self.address = ""
        self.malformed = 0
        self.unattached = 0
        self.undelivered = 0

    async def start(self) -> None:
        """Bind to a free port; `address` is known afterwards. Raises ConfigError."""
        if "[" in self._host:
            self._socket.setsockopt(zmq.IPV6, 1)
        if self._keys is not None:
            self._gate = Gate(self._context, self._keys)
            self._keys.listen(self._socket)
        try:
            self._socket.bind(f"tcp://{self._host}:*")
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot bind {self._host}: {error}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        events = f"inproc://{id(self)}"
        self._socket.monitor(events, zmq.EVENT_DISCONNECTED)
        self._monitor.connect(events)

    async def close(self) -> None:
        """Only after whoever awaits `receive` was cancelled."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        # What a worker said last, the last tokens of a stream included, may still be in the queue.
        self._socket.close(linger=LINGER_MS)
        if self._gate is not None:
            await self._gate.close()
        self._context.term()

    def set_info(self, info: WorkerInfo) -> None:
        """What Attach is answered with from now on."""
        self._info = info

    async def receive(self) -> tuple[bytes, ToWorker]:
        """The next message of an attached router, with the identity to answer to."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            router = frames[0].bytes
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames) - 1} frames instead of 1")
                message = decode_for_worker(frames[1].buffer)
            except ProtocolError as error:
                self.malformed += 1
                log.debug("dropped a message from router %s: %s", router.hex(), error)
                continue
            if isinstance(message, Attach):
                self._attach(router, message, frames[1])
            elif router in self._heard:
                self._heard[router] = time.monotonic()
                return router, message
            else:
                self.unattached += 1

    def send(self, router: bytes, message: ToRouter) -> None:
        """Never blocks. A router that is gone is ignored; one that does not read is given up."""
        if router not in self._heard:
            self.undelivered += 1
        elif not try_send(self._socket, [router, encode(message)]):
            self.undelivered += 1
            self._lose(router)

    def silent(self, now: float, limit_s: float) -> list[bytes]:
        """Routers that were not heard of for `limit_s`, that do not read, or whose connection
        closed. Each is reported once and forgotten; `now` is `time.monotonic()`."""
        self._read_closed()
        # After a pause of this process the proof of life may still lie unread in the socket.
        if not cast(int, self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            for router in [r for r, heard in self._heard.items() if now - heard > limit_s]:
                self._lose(router)
        lost, self._lost = self._lost, []
        return lost

    def _attach(self, router: bytes, attach: Attach, frame: zmq.Frame) -> None:
        if self._info is None:
            return  # the router repeats it
        # An earlier connection with the same descriptor was closed before this one was opened:
        # read its end first, or it would be taken for the end of this one.
        self._read_closed()
        if attach.version == self._info.version:
            self._heard[router] = time.monotonic()
            self._routers[frame.get(zmq.SRCFD)] = router
        # The other version is told as well: it is the router that refuses, and says so.
        try_send(self._socket, [router, encode(Attached(self._info))])

    def _read_closed(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            router = self._routers.pop(event["value"], None)
            if router is not None:
                self._lose(router)

    def _lose(self, router: bytes) -> None:
        if self._heard.pop(router, None) is not None:
            self._lost.append(router)


class RouterLink:
    """The router's end: connects to the workers that it is given, again after each loss."""

    def __init__(self, router: str, timers: TimerConfig, keys: CurveKeys | None = None) -> None:
        """With `keys`, it talks to workers with an allowed key and to no others."""
        self._router = router
        self._timers = timers
        self._keys = keys
        self._context = zmq.Context()
        self._lines: dict[str, Line] = {}
        self._tasks: dict[Line, asyncio.Task[None]] = {}
        self._events: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self._room = asyncio.Semaphore(QUEUE)
        """Unread messages: a slow router stops reading its sockets instead of filling memory."""
        self.undelivered = 0
        self._malformed = 0

    @property
    def malformed(self) -> int:
        """Messages that were dropped because they could not be read."""
        return self._malformed + sum(line.malformed for line in self._tasks)

    def connect(self, info: WorkerInfo) -> None:
        """Connect to a worker of the registry. A new epoch at a known address is noticed by the
        link itself, so that a registry that lags behind changes nothing."""
        line = self._lines.get(info.id)
        if line is not None:
            if line.info.address == info.address and not (
                line.refused and line.info.epoch != info.epoch
            ):
                return
            self._end(line, "moved")
        self._start(info)

    def disconnect(self, worker_id: str) -> None:
        """Forget a worker; no Down follows."""
        line = self._lines.pop(worker_id, None)
        if line is not None:
            self._end(line, "disconnected")

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Never blocks. A worker that is not up is ignored: its Down is on the way."""
        line = self._lines.get(worker_id)
        if line is None or not line.up:
            self.undelivered += 1
        elif not line.send(message):
            self.undelivered += 1
            self._end(line, "full")
            self._start(line.info)

    async def receive(self) -> LinkEvent:
        while True:
            event = await self._events.get()
            if isinstance(event, Message):
                self._room.release()
            worker_id = event.info.id if isinstance(event, Up) else event.worker_id
            if worker_id in self._lines:  # else it was disconnected in the meantime
                return event

    async def close(self) -> None:
        self._lines.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.term()

    def _start(self, info: WorkerInfo) -> None:
        line = self._lines[info.id] = Line(
            self._context, self._router, info, self._timers, self._keys
        )
        task = self._tasks[line] = asyncio.create_task(self._attend(line))
        task.add_done_callback(lambda task: self._over(line, task))

    def _end(self, line: Line, reason: str) -> None:
        """End a line that may be alive, from outside its task."""
        if line in self._tasks:
            self._tasks[line].cancel()
        if line.up:
            line.up = False
            self._events.put_nowait(Down(line.info.id, reason))

    async def _attend(self, line: Line) -> None:
        async with aclosing(line.events()) as events:
            async for event in events:
                if isinstance(event, Message):
                    await self._room.acquire()
                self._events.put_nowait(event)

    def _over(self, line: Line, task: asyncio.Task[None]) -> None:
        del self._tasks[line]
        self._malformed += line.malformed
        line.close()
        if not task.cancelled():
            task.result()
            if self._lines.get(line.info.id) is line and not line.refused:
                self._start(line.info)
