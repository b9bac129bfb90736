"""The transfer endpoint of a worker: owns the sockets, the clock and the timers.

Lives in the asyncio loop of the I/O thread. The worker passes it the engine's commands; events
for the engine are put into `inbox`. Any endpoint may send and receive. The protocol itself is in
`Sender` and `Receiver`; this file only moves their messages.

One bound ROUTER takes the control messages of senders; their data comes over a listener of each
transport that is offered. To each receiver that it sends to, an endpoint opens a `Channel`: a
control DEALER and a data outlet.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from random import SystemRandom
from typing import Any, Protocol

import zmq
import zmq.asyncio

from common.config import TimerConfig
from common.curve import Caller, CurveKeys, Gate
from common.errors import ConfigError, ProtocolError
from common.messages import Peer
from kvtransfer import protocol
from kvtransfer.accepting import longer
from kvtransfer.arrivals import Arrivals
from kvtransfer.channel import Channel, cancel
from kvtransfer.commands import (
    ReceiverCommand,
    ReceiverEvent,
    SenderCommand,
    SenderEvent,
)
from kvtransfer.copying import library
from kvtransfer.departures import Departures
from kvtransfer.identity import EndpointIdentity
from kvtransfer.intake import Intake
from kvtransfer.memory import BlockMemory, StagedMemory
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.sockets import ControlSocket
from kvtransfer.staging import Waiting, halves
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from kvtransfer.transport import Listener, Outlet, Stream
from kvtransfer.transports import connect, listen, offered

log = logging.getLogger("tandem.transfer")

TransferEvent = SenderEvent | ReceiverEvent

_MAX_CONTROL_BYTES = 16 << 20
_MAX_FUTILE = 2
"""Data connections of one transport in a row that may be lost before a block lands: a link takes
the next transport then."""
_MAX_DOUBLINGS = 4
"""Of the pause before a data connection is made again, one for each that was lost in that way."""


class Inbox(Protocol):
    """The queue of the engine thread: a `queue.SimpleQueue`."""

    def put(self, item: TransferEvent, /) -> None: ...


class Endpoint:
    """See the module. All methods are called in the loop that ran `start`."""

    def __init__(
        self,
        identity: EndpointIdentity,
        memory: BlockMemory,
        inbox: Inbox,
        timers: TimerConfig,
        host: str,
        transport: str = "auto",
        keys: CurveKeys | None = None,
    ) -> None:
        """`host` is bound and announced. With `keys`, control messages and data over zmq go to
        and come from allowed keys alone. Raises ConfigError for a `transport` (one of
        `common.config.TRANSPORTS`) that cannot be used here. The first one on a machine compiles
        its copies. `memory` that is a `StagedMemory`: blocks go through its slots."""
        library()
        self.address = ""
        if keys is not None:
            identity = replace(identity, curve_key=keys.public.decode())
        self._transports = offered(transport, memory)
        self._memory = memory
        self._inbox = inbox
        self._host = host
        self._keys = keys
        self._gate: Gate | None = None
        self._timers = Timers.of(timers)
        self._stats = TransferStats()
        heartbeat_ms = max(1, int(timers.heartbeat_s * 1000))
        self._options: dict[int, int] = {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: _MAX_CONTROL_BYTES,
            zmq.HEARTBEAT_IVL: heartbeat_ms,
            zmq.HEARTBEAT_TIMEOUT: heartbeat_ms * timers.dead_after,
        }
        """Of control sockets: a peer that is stopped or cut off loses its connection."""
        random = SystemRandom()
        self._sender = Sender(identity, memory, self._timers, self._stats, random)
        self._receiver = Receiver(identity, memory.block_bytes, self._timers, self._stats, random)
        self._sender.transports = self._transports
        self._intake = Intake(self._receiver, memory, self._stats)
        self._departures: Departures | None = None
        self._arrivals: Arrivals | None = None
        self._waiting = Waiting()
        if isinstance(memory, StagedMemory):
            out, into = halves(memory)
            self._departures = Departures(self._sender, memory, out)
            self._arrivals = Arrivals(self._receiver, memory, self._stats, into, self._waiting)
            self._intake = self._arrivals
            # No message has more blocks than there are slots to receive it into.
            window = min(self._receiver.window, into.count * memory.block_bytes)
            self._receiver.window = window
        self._listeners: dict[str, Listener] = {}
        self._channels: dict[Peer, Channel] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._readers: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._is_closing = False

    # ------------------------------------------------------------ for the worker

    async def start(self) -> None:
        """Bind the sockets. Raises ConfigError if `host` cannot be bound."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._context = zmq.asyncio.Context()
        self._control = ControlSocket(self._context, zmq.ROUTER)
        for option, value in self._options.items():
            self._control.plain.setsockopt(option, value)
        self._control.plain.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self._keys is not None:
            self._gate = Gate(self._context, self._keys)
            self._keys.listen(self._control.plain)
        try:
            self._control.plain.bind(f"tcp://{self._host}:*")
            for name in self._transports:
                try:
                    await self._listen(name)
                except ConfigError as error:
                    if len(self._transports) == 1:
                        raise
                    log.warning("%s", error)
            self._transports = tuple(self._listeners)
            self._sender.transports = self._transports
        except ConfigError:
            await self.close()
            raise
        except (OSError, zmq.ZMQError) as error:
            await self.close()
            raise ConfigError(f"cannot bind a port of {self._host}: {error}") from error
        self.address = self._control.plain.getsockopt_string(zmq.LAST_ENDPOINT)
        self._sender.address = self.address
        loops = [self._read_control(), self._tick(), *map(self._accept, self._transports)]
        if self._departures is not None and self._arrivals is not None:
            loops += [self._load(self._departures), self._land(self._arrivals)]
        self._tasks = [self._start(loop) for loop in loops]

    async def failed(self) -> None:
        """Waits for ever; raises what ended a loop of this endpoint, if that happens."""
        await asyncio.shield(self._failure)

    async def close(self) -> None:
        """Close all sockets. What is still live is not reported: drain or reset before."""
        self._is_closing = True
        await cancel([*self._tasks, *self._readers])
        for listener in self._listeners.values():
            listener.close()
        self._intake.close()
        if self._departures is not None:
            self._departures.close()
        self._waiting.close()
        for peer in list(self._channels):
            await self._channels.pop(peer).close()
        if self._closing:
            await asyncio.wait(self._closing)
        self._control.close(linger=100)
        if self._gate is not None:
            await self._gate.close()
        self._context.term()

    def command(self, command: SenderCommand | ReceiverCommand) -> None:
        """Carry out a command of the engine. Commands of one key come in order."""
        now = time.monotonic()
        if isinstance(command, SenderCommand):
            self._sender.command(command, now)
        else:
            self._receiver.command(command, now)
        self._flush()

    def set_progress(self, steps: int, step_s: float = 0.0) -> None:
        """Engine steps so far and the predicted seconds of the longest step in progress: a
        receiver is patient for three times as long."""
        self._sender.set_progress(steps, step_s)

    def reset(self, epoch: int) -> None:
        """Begin a new life: transfers are Broken("reset"), grants Returned(..., "reset")."""
        now = time.monotonic()
        identity = replace(self._sender.identity, epoch=epoch)
        self._sender.reset(identity, now)
        self._receiver.reset(identity, now)
        self._flush()

    def stats(self) -> TransferStats:
        """A copy of the counters."""
        staging = [part.slots for part in (self._departures, self._arrivals) if part is not None]
        return replace(
            self._stats,
            broken=self._stats.broken.copy(),
            returned=self._stats.returned.copy(),
            dropped=self._stats.dropped.copy(),
            bytes_sent_over=self._stats.bytes_sent_over.copy(),
            bytes_received_over=self._stats.bytes_received_over.copy(),
            seconds_receiving_over=self._stats.seconds_receiving_over.copy(),
            sending=self._sender.num_live,
            receiving=self._receiver.num_live,
            links=len(self._channels),
            slots=sum(slots.count for slots in staging),
            slots_taken=sum(slots.num_taken for slots in staging),
            links_over=Counter(
                channel.outlet.transport
                for channel in self._channels.values()
                if channel.outlet is not None
            ),
        )

    def _data_address(self, transport: str) -> str:
        """Where to listen for data; see `kvtransfer.transports.listen`."""
        return f"tcp://{self._host}:*" if transport == "zmq" else self._host

    # ------------------------------------------------------------ loops

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._timers.resend_s / 5)
            now = time.monotonic()
            self._sender.tick(now)
            self._receiver.tick(now)
            self._replace_stalled()
            self._flush()
            for part in (self._departures, self._arrivals):
                if part is not None:
                    part.check()

    async def _read_control(self) -> None:
        while True:
            frames = await self._control.receive()
            try:
                if len(frames) != 2:
                    raise ProtocolError("control message of several frames")
                message = protocol.decode_for_receiver(frames[1])
            except ProtocolError:
                self._stats.dropped["malformed"] += 1
                continue
            self._receiver.message(frames[0], message, time.monotonic())
            self._flush()

    async def _listen(self, name: str) -> None:
        """Let data come in over this transport, and tell senders where. Raises OSError,
        zmq.ZMQError, ConfigError."""
        address = self._data_address(name)
        layout = self._receiver.identity.layout
        listener = await listen(name, self._context, address, self._memory, self._keys, layout)
        self._listeners[name] = listener
        self._receiver.data[name] = listener.address

    async def _accept(self, name: str) -> None:
        pause_s = 0.0
        while True:
            try:
                stream = await self._listeners[name].accept()
            except ConnectionResetError as error:
                log.error("data over %s: %s; starting again", name, error)
                await self._listen_again(name, pause_s)
                pause_s = longer(pause_s)
                continue
            pause_s = 0.0
            if self._intake.add(stream):
                reader = self._start(self._read_data(stream))
                self._readers.add(reader)
                reader.add_done_callback(self._readers.discard)

    async def _listen_again(self, name: str, pause_s: float) -> None:
        """After the loss of a listener, and this pause; senders are told the new address."""
        self._listeners.pop(name).close()
        if len(self._receiver.data) > 1:
            # Who greets meanwhile takes another transport; if there is none, it may try this one.
            self._receiver.data.pop(name, None)
        while name not in self._listeners:
            await asyncio.sleep(pause_s)
            pause_s = longer(pause_s)
            try:
                await self._listen(name)
            except (OSError, ConfigError) as error:
                log.error("cannot listen over %s: %s", name, error)
        self._receiver.announce()
        self._flush()

    async def _read_data(self, stream: Stream) -> None:
        async for _ in self._intake.read(stream):
            self._flush()
        self._flush()

    async def _load(self, departures: Departures) -> None:
        """Send what is in its slots."""
        while True:
            await self._waiting.over(await departures.copies.get())
            self._flush()

    async def _land(self, arrivals: Arrivals) -> None:
        async for _ in arrivals.landings():
            self._flush()

    async def _read_answers(self, peer: Peer, channel: Channel) -> None:
        while True:
            frames = await channel.control.receive()
            try:
                if len(frames) != 1:
                    raise ProtocolError("control message of several frames")
                message = protocol.decode_for_sender(frames[0])
            except ProtocolError:
                self._stats.dropped["malformed"] += 1
                continue
            self._sender.message(peer, message, time.monotonic())
            self._flush()

    async def _watch_control(self, peer: Peer, channel: Channel) -> None:
        while True:
            if await channel.monitor.changed():
                self._sender.connected(peer, time.monotonic())
            else:
                self._sender.disconnected(peer, time.monotonic())
            self._flush()

    async def _carry(self, peer: Peer, channel: Channel) -> None:
        """Keep a data connection to this receiver up as long as there is a link to it."""
        connect_s = self._timers.connect_s
        down_since = time.monotonic()
        futile: Counter[str] = Counter()
        while (link := self._sender.links.get(peer)) is not None:
            addresses = link.data
            names = [name for name in self._transports if name in addresses]
            names = [name for name in names if futile[name] < _MAX_FUTILE] or names
            pause_s = self._timers.resend_s / 5
            outlet, failures = await connect(
                names,
                addresses,
                self._context,
                self._memory,
                self._sender.identity.layout.block_size,
                connect_s,
                channel.caller,
                self._listeners,
            )
            now = time.monotonic()
            if outlet is not None:
                note = f" ({failures})" if failures else ""
                log.info("KV blocks to %s go over %s%s", peer.id, outlet.transport, note)
                channel.outlet, channel.connected_at = outlet, now
                self._flush()
                await self._until_lost(outlet, channel)
                channel.outlet = None
                outlet.close()
                if self._departures is not None:
                    self._departures.lost(peer)
                down_since = time.monotonic()
                used = outlet.transport
                futile[used] = self._num_futile(peer, now, futile[used])
                pause_s *= 2 ** min(futile[used], _MAX_DOUBLINGS)
                self._sender.data_lost(peer, down_since)
                log.info("the data connection to %s was lost", peer.id)
            elif now - down_since >= connect_s:
                self._sender.lost(peer, f"no data connection: {failures}", now)
            self._flush()
            await asyncio.sleep(pause_s)

    async def _until_lost(self, outlet: Outlet, channel: Channel) -> None:
        """Or until it is to be replaced."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as channel.patience:
                while await outlet.changed():
                    self._flush()
        channel.patience = None

    def _replace_stalled(self) -> None:
        """A network may lose a connection without a word; the kernel then tries for very long."""
        for peer, link in self._sender.links.items():
            channel = self._channels.get(peer)
            if channel is None or channel.patience is None:
                continue
            if link.stalled_at > channel.connected_at:
                log.warning("nothing lands at %s: the data connection is made again", peer.id)
                channel.patience.reschedule(0.0)
                channel.patience = None

    def _num_futile(self, peer: Peer, connected_at: float, before: int) -> int:
        """Connections in a row on which nothing landed though there was something to send, after
        one from `connected_at` was lost."""
        link = self._sender.links.get(peer)
        if link is None or link.moved_at >= connected_at:
            return 0
        return before + any(transfer.is_waiting for transfer in link.transfers.values())

    # ------------------------------------------------------------ moving messages

    def _flush(self) -> None:
        """Send what the state machines have queued, hand their events to the engine.

        Before an event gives blocks back to the engine their bytes are let go of. Nothing once
        the endpoint closes: a link that is still live would get a new channel."""
        if self._is_closing:
            return
        self._intake.abandon_ended()
        reading: set[int] = set()
        outlets = [(peer, channel.outlet) for peer, channel in self._channels.items()]
        for peer, outlet in outlets:
            if outlet is not None and outlet.reading is not None:
                if self._sender.is_live(peer, outlet.reading):
                    reading.add(outlet.reading)
                else:
                    outlet.abandon()
        if self._departures is not None:
            self._departures.settle(reading)
        for events in (self._sender.events, self._receiver.events):
            while events:
                self._inbox.put(events.popleft())
        while self._sender.outbox:
            peer, request = self._sender.outbox.popleft()
            # A link that has ended still says goodbye on its channel, if there is one.
            channel = self._channels.get(peer)
            if channel is not None:
                self._send(channel.control, [protocol.encode(request)])
        while self._receiver.outbox:
            route, answer = self._receiver.outbox.popleft()
            error = self._send(self._control, [route, protocol.encode(answer)])
            if error == zmq.EHOSTUNREACH:
                self._receiver.unreachable(route, time.monotonic())
        self._match_channels()
        has_data = self._sender.has_data
        if self._departures is not None:
            has_data = has_data or self._departures.is_ready
        if not self._pumping and has_data:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _send(self, socket: ControlSocket, frames: list[bytes]) -> int:
        """Send or drop, never wait: everything important is repeated. Returns the errno or 0."""
        error = socket.send(frames)
        if error:
            self._stats.dropped["unsent"] += 1
        return error

    def _pump(self) -> None:
        """Send one data message to each receiver that can take one, then let the loop breathe."""
        self._pumping = False
        if self._context.closed:
            return
        now = time.monotonic()
        sent = False
        for peer, channel in self._channels.items():
            if channel.outlet is None:
                continue
            if self._departures is not None and self._departures.fill(peer, now):
                sent = True
            if channel.outlet.writable():
                before = self._stats.bytes_sent
                in_place = channel.outlet.in_place
                if self._departures is not None:
                    shipment = self._departures.next_shipment(peer, in_place)
                else:
                    shipment = self._sender.next_shipment(peer, now, in_place)
                if shipment is not None:
                    channel.outlet.send(shipment)
                    num_bytes = self._stats.bytes_sent - before
                    self._stats.bytes_sent_over[channel.outlet.transport] += num_bytes
                    sent = True
        if sent:
            self._flush()

    def _match_channels(self) -> None:
        """Open and close sockets so that each link of the sender has its channel."""
        links = self._sender.links
        for peer in self._channels.keys() - links.keys():
            task = asyncio.get_running_loop().create_task(self._channels.pop(peer).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for peer, link in list(links.items()):
            try:
                channel = self._channels.get(peer) or self._open(peer)
                if link.up and not channel.has_carrier:
                    channel.has_carrier = True
                    channel.tasks.append(self._start(self._carry(peer, channel)))
            except (zmq.ZMQError, ConfigError) as error:
                self._sender.lost(peer, f"{peer.address}: {error}", time.monotonic())
                self._flush()

    def _open(self, peer: Peer) -> Channel:
        caller = Caller(self._keys, peer.curve_key)
        if caller.objection:
            log.error("cannot send KV blocks to %s: %s", peer.id, caller.objection)
            raise ConfigError(caller.objection)
        channel = self._channels[peer] = Channel(self._context, peer.address, self._options, caller)
        channel.tasks += [
            self._start(self._read_answers(peer, channel)),
            self._start(self._watch_control(peer, channel)),
        ]
        return channel

    def _start(self, loop: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a loop whose failure is the endpoint's failure."""
        task = asyncio.get_running_loop().create_task(loop)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)
