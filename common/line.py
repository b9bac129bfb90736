"""One connection of a router to a worker, from connect to loss; owned by `common.link`.

    connecting --handshake--> Attach sent --Attached--> up --Down--> over (a new Line follows)

ZMQ retries while connecting, with exponential backoff. Once up, the first sign of trouble ends
the line: whatever the worker was doing for this router is lost then, so there is nothing to
resume. What lies unread in the socket is delivered before the Down.
"""

import errno
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common.bell import Bell
from common.config import TimerConfig
from common.curve import Caller, CurveKeys
from common.errors import ProtocolError
from common.messages import (
    VERSION,
    Attach,
    Attached,
    Ping,
    Pong,
    ToRouter,
    ToWorker,
    WorkerInfo,
    decode_for_router,
    encode,
)

log = logging.getLogger(__name__)

QUEUE: Final = 10_000
"""Messages that wait in one direction of one connection before the peer counts as lost."""
MAX_MESSAGE_BYTES: Final = 256 << 20
RECONNECT_MS: Final = (50, 2_000)
"""First and longest interval between attempts to connect."""
DRAIN: Final = 256
"""Messages that are read before the next look at the clock."""


@dataclass(frozen=True, slots=True)
class Up:
    """The worker answered: it may be sent work."""

    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class Message:
    worker_id: str
    message: ToRouter


@dataclass(frozen=True, slots=True)
class Down:
    """Everything that the worker was doing for this router is lost.

    reason: `closed` (connection), `silent` (missed heartbeats), `epoch` (the worker began a new
    life), `moved` (new address), `full` (it does not read); `address`, `version`, `id` or `key`:
    it never was up and is not tried again until the registry shows another epoch or address.
    """

    worker_id: str
    reason: str


LinkEvent = Up | Message | Down


def limit(socket: zmq.Socket[Any], heartbeat_s: float, timeout_s: float) -> None:
    """Options of both ends: bounded queues and messages, nothing kept on close, and ZMTP
    heartbeats, so that a peer without power or network is noticed as well."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(heartbeat_s * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(timeout_s * 1000))


def try_send(socket: zmq.asyncio.Socket, frames: Sequence[bytes]) -> bool:
    """Send without waiting; False if the peer is gone or its queue is full."""
    sent: Any = socket.send_multipart(frames, zmq.NOBLOCK)
    error = sent.exception()  # a NOBLOCK send is done when it returns
    if error is None:
        return True
    if isinstance(error, zmq.ZMQError) and error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
        return False
    raise error


def _try_receive(socket: zmq.SyncSocket) -> list[bytes] | None:
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


class Line:
    """`info` is what the registry says until the worker is up, then what it said itself."""

    def __init__(
        self,
        context: "zmq.Context[zmq.SyncSocket]",
        router: str,
        info: WorkerInfo,
        timers: TimerConfig,
        keys: CurveKeys | None,
    ) -> None:
        caller = Caller(keys, info.curve_key)
        self.info = info
        self.up = False
        self.refused = False
        self.malformed = 0
        self._router = router
        self._timers = timers
        self._objection = caller.objection
        self._greeted = False
        """The ZMTP handshake of the present connection is done."""
        self._pings = 0
        self._unanswered = 0
        self._socket = context.socket(zmq.DEALER)
        limit(self._socket, timers.heartbeat_s, timers.heartbeat_s * (timers.dead_after + 1))
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
        self._socket.setsockopt(zmq.IPV6, int("[" in info.address))
        # Never begins with a zero byte, which ZMQ keeps for identities of its own making.
        identity = b"r" + blake2b(router.encode(), digest_size=7).digest() + secrets.token_bytes(8)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        if not self._objection:
            caller.prepare(self._socket)
        self._bell: Bell | None = None
        """There while `events` runs."""
        self._monitor: zmq.SyncSocket = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        )

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def send(self, message: ToWorker) -> bool:
        """False if the worker's queue is full."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            if self._bell is not None:
                self._bell.look(self._socket)
        return True

    async def events(self) -> AsyncGenerator[LinkEvent, None]:
        """Up, then Messages, then one Down; or only a Down. Nothing while it cannot connect."""
        if self._objection:
            yield self._refuse_key()
            return
        try:
            self._socket.connect(self.info.address)
        except zmq.ZMQError as error:
            log.warning("worker %s: bad address %r: %s", self.info.id, self.info.address, error)
            yield self._refuse("address")
            return
        self._bell = Bell((self._socket, self._monitor))
        try:
            async for event in self._follow(self._bell):
                yield event
        finally:
            self._bell.close()
            self._bell = None

    async def _follow(self, bell: Bell) -> AsyncGenerator[LinkEvent, None]:
        bell.wake_in(self._timers.heartbeat_s)
        while True:
            await bell.wait()
            lost = self._read_monitor() and self.up
            if self._objection:
                yield self._refuse_key()
                return
            for message in self._unread(bell, everything=lost):
                event = self._take(message)
                if event is not None:
                    yield event
                if isinstance(event, Down):
                    return
            if lost:
                yield self._down("closed")
                return
            if bell.is_due:
                # Unread answers were taken above, so a pause of the router blames nobody.
                bell.wake_in(self._timers.heartbeat_s)
                trouble = self._beat()
                if trouble:
                    yield self._down(trouble)
                    return

    def _read_monitor(self) -> bool:
        """Greets after each handshake; True if a connection was lost."""
        lost = False
        while (frames := _try_receive(self._monitor)) is not None:
            event = parse_monitor_message(frames)["event"]
            self._greeted = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._greeted:
                self.send(Attach(self._router, VERSION))
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._objection = "it does not accept the key of this router"
            else:
                lost = True
        return lost

    def _unread(self, bell: Bell, everything: bool) -> list[ToRouter]:
        messages: list[ToRouter] = []
        for _ in range(QUEUE if everything else DRAIN):
            frames = _try_receive(self._socket)
            if frames is None:
                break
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"{len(frames)} frames instead of 1")
                messages.append(decode_for_router(frames[0]))
            except ProtocolError as error:
                self.malformed += 1
                log.debug("dropped a message from worker %s: %s", self.info.id, error)
        else:
            bell.ring()  # there may be more
        if messages:
            self._unanswered = 0
        return messages

    def _take(self, message: ToRouter) -> LinkEvent | None:
        if isinstance(message, Attached):
            return None if self.up else self._attached(message.info)
        if not self.up:
            return None
        if isinstance(message, Pong) and message.epoch != self.info.epoch:
            return self._down("epoch")
        return Message(self.info.id, message)

    def _attached(self, info: WorkerInfo) -> LinkEvent:
        if info.version != VERSION:
            log.error(
                "worker %s speaks protocol version %d, not %d", info.id, info.version, VERSION
            )
            return self._refuse("version")
        if info.id != self.info.id:
            log.error("%s is worker %s, not %s", self.info.address, info.id, self.info.id)
            return self._refuse("id")
        self.info = info
        self.up = True
        return Up(info)

    def _beat(self) -> str:
        """Sends what is due; the reason if the worker is lost, else empty."""
        if not self.up:
            if self._greeted:
                self.send(Attach(self._router, VERSION))
            return ""
        if self._unanswered >= self._timers.dead_after:
            return "silent"
        self._unanswered += 1
        self._pings += 1
        return "" if self.send(Ping(self._pings)) else "full"

    def _refuse_key(self) -> Down:
        log.error("cannot connect to worker %s: %s", self.info.id, self._objection)
        return self._refuse("key")

    def _refuse(self, reason: str) -> Down:
        self.refused = True
        return Down(self.info.id, reason)

    def _down(self, reason: str) -> Down:
        self.up = False
        return Down(self.info.id, reason)
