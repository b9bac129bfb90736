"""The receiving half of an endpoint as a pure state machine: no sockets, no clock.

Called by `Endpoint` (and by the simulation in the tests). A slot is written only between
`accept`, which checks everything that the sender claims, and `landed`, which checks the digests,
and only while the engine's grant is open: a transfer that ends meanwhile gives its grant back
when its last copy is over.

Each key that the engine saw in Wanted ends in exactly one of Arrived, Returned or the engine's
own Refuse. A Grant or Revoke that crosses the Returned of its key is answered by that Returned.
"""

import hmac
from collections import deque
from collections.abc import Sequence
from random import Random

from common.blockhash import HASH_BYTES
from kvtransfer import protocol as p
from kvtransfer.commands import (
    Arrived,
    Decline,
    First,
    Grant,
    Key,
    ReceiverCommand,
    ReceiverEvent,
    Refuse,
    Requested,
    Returned,
    Revoke,
    Wait,
    Wanted,
)
from kvtransfer.identity import EndpointIdentity
from kvtransfer.incoming import Incoming, Landing, Source, State
from kvtransfer.sources import Sources
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from kvtransfer.tombstones import Tombstones

MAX_ROUNDS = 3
MAX_STEP_S = 60.0
"""A longer predicted engine step is not believed."""


class Receiver:
    """All incoming transfers of one endpoint, by sender.

    `random` draws the secrets: a `SystemRandom` outside tests. `outbox` holds (route, message)
    pairs that the caller takes away and may lose; `events` go to the engine and must not be.
    """

    def __init__(
        self,
        identity: EndpointIdentity,
        block_bytes: int,
        timers: Timers,
        stats: TransferStats,
        random: Random,
    ) -> None:
        self.identity = identity
        self.data: dict[str, str] = {}
        """Data addresses by transport, for Welcome."""
        self.window = p.WINDOW_BYTES
        """What one sender may have under way at most."""
        self.outbox: deque[tuple[bytes, p.ToSender]] = deque()
        self.events: deque[ReceiverEvent] = deque()
        self._block_bytes = block_bytes
        self._wire = p.Wire.of(identity.layout)
        self._timers = timers
        self._stats = stats
        self._random = random
        self._sources = Sources(timers)
        self._transfers: dict[int, Incoming] = {}
        self._keys: dict[Key, Incoming] = {}
        self._ended: Tombstones[int, p.Ack | p.Nack] = Tombstones(timers.tombstone_s)
        self._ended_keys: Tombstones[Key, int] = Tombstones(timers.tombstone_s)

    @property
    def num_live(self) -> int:
        return len(self._keys)

    # ------------------------------------------------------------ from the engine

    def command(self, command: ReceiverCommand, now: float) -> None:
        if isinstance(command, Decline):
            source = self._sources.find(command.peer)
            if source is not None:
                self.outbox.append((source.route, p.Declined(command.key, command.reason)))
            return
        transfer = self._keys.get(command.key)
        if transfer is None:
            ended = self._ended_keys.get(command.key) is not None
            if isinstance(command, Grant | Revoke) and not ended:
                self._return(command.key, (), "gone")
            return
        match command:
            case Grant():
                self._grant(transfer, command, now)
            case Wait():
                assert transfer.state in (State.WANTED, State.WAITING), transfer.state
                transfer.state = State.WAITING
            case Refuse(_, reason):
                assert transfer.state in (State.WANTED, State.WAITING), transfer.state
                self._forget(transfer, p.Nack(transfer.id, reason), now)
            case Revoke():
                self._end(transfer, "revoked", "gone", now)

    def reset(self, identity: EndpointIdentity, now: float) -> None:
        """Begin a new life: every grant comes back, every sender must say Hello again."""
        for source in self._sources:
            self._lose(source, "reset", "epoch", now)
        self.identity = identity

    def _grant(self, transfer: Incoming, command: Grant, now: float) -> None:
        assert transfer.state in (State.WANTED, State.WAITING), transfer.state
        slots = {slot.position: slot for slot in command.slots}
        assert len(slots) == len(command.slots), command
        assert all(0 <= position < transfer.num_blocks for position in slots), command
        transfer.state = State.GRANTED
        transfer.slots = slots
        transfer.secret = self._random.randbytes(p.SECRET_BYTES)
        transfer.round = 1
        transfer.moved_at = now
        self._send_ticket(transfer)

    # ------------------------------------------------------------ from the connection

    def unreachable(self, route: bytes, now: float) -> None:
        """An answer could not be sent: the connection of this route is closed."""
        self._sources.unreachable(route, now)

    def announce(self) -> None:
        """The data addresses have changed: tell every sender."""
        for source in self._sources:
            self.outbox.append((source.route, self._welcome(dict(self.data))))

    def message(self, route: bytes, message: p.ToReceiver, now: float) -> None:
        if isinstance(message, p.Hello):
            self._hello(route, message, now)
            return
        source = self._sources.hear(route, now)
        if source is None:
            self._stats.dropped["unknown_route"] += 1
            self.outbox.append((route, p.Refused("unknown", "say Hello first")))
            return
        match message:
            case p.Begin():
                self._begin(source, message, now)
            case p.Fetch(key, hashes):
                if hashes and len(hashes) % HASH_BYTES == 0:
                    self.events.append(Requested(key, source.peer, hashes))
                else:
                    self._stats.dropped["fetch"] += 1
            case p.Progress(steps, step_s):
                if steps > source.steps:
                    source.steps, source.stepped_at = steps, now
                source.step_s = min(step_s, MAX_STEP_S)
            case p.Close(transfer=number) | p.AbortTransfer(transfer=number):
                transfer = self._transfers.get(number)
                if transfer is not None and transfer.source is not source:
                    self._stats.dropped["source"] += 1
                elif isinstance(message, p.Close):
                    self._close(source, transfer, message, now)
                elif transfer is not None:
                    reason = "finished" if message.reason == "finished" else "aborted"
                    self._end(transfer, reason, "gone", now)
                elif self._ended.get(number) is None:
                    # It may have overtaken its Begin.
                    self._ended.add(number, p.Nack(number, "gone"), now)

    def _hello(self, route: bytes, hello: p.Hello, now: float) -> None:
        refused = self.identity.refusal(hello)
        data = {name: self.data[name] for name in hello.transports if name in self.data}
        if refused is None and not data:
            here = ", ".join(self.data)
            there = ", ".join(hello.transports)
            refused = p.Refused("transport", f"{there} of the sender, {here} here")
        if refused is not None:
            self._stats.dropped[f"hello_{refused.reason}"] += 1
            self.outbox.append((route, refused))
            return
        if self._sources.is_full():
            # Who is forgotten is asked to say Hello when it speaks again.
            self._lose(self._sources.oldest(), "peer", "gone", now)
        self._sources.greet(hello.source, route, now)
        self.outbox.append((route, self._welcome(data)))

    def _begin(self, source: Source, begin: p.Begin, now: float) -> None:
        if begin.destination_epoch != self.identity.epoch:
            self.outbox.append((source.route, p.Nack(begin.transfer, "epoch")))
            return
        if begin.source_epoch != source.peer.epoch or begin.num_tokens < 1:
            self._stats.dropped["begin"] += 1
            return
        transfer = self._transfers.get(begin.transfer)
        if transfer is None:
            answer = self._ended.get(begin.transfer)
            if answer is None and self._is_taken(begin.key):
                answer = p.Nack(begin.transfer, "gone")
            if answer is not None:
                self.outbox.append((source.route, answer))
                return
            block_size = self.identity.layout.block_size
            transfer = Incoming(
                key=begin.key,
                id=begin.transfer,
                source=source,
                num_tokens=begin.num_tokens,
                num_blocks=-(-begin.num_tokens // block_size),
                begun_at=now,
            )
            self._transfers[transfer.id] = source.transfers[transfer.id] = transfer
            self._keys[transfer.key] = transfer
        if transfer.source is not source or transfer.key != begin.key:
            self._stats.dropped["source"] += 1
            return
        transfer.begun_at = now
        transfer.is_owed = True
        if transfer.state is State.GRANTED:
            if begin.round >= transfer.round:
                self._next_round(transfer, now)
            else:
                self._send_ticket(transfer)
        else:
            # The ticket may be there in a moment: else the next tick says Waiting.
            if transfer.state is State.WANTED:
                self.events.append(Wanted(transfer.key, source.peer, transfer.num_tokens))

    def _close(self, source: Source, transfer: Incoming | None, close: p.Close, now: float) -> None:
        if transfer is None:
            answer = self._ended.get(close.transfer) or p.Nack(close.transfer, "gone")
            self.outbox.append((source.route, answer))
        elif transfer.state is State.GRANTED:
            self._take_first(transfer, close.first, now)
            if not self._arrive(transfer, now):
                self._repair(transfer, now)

    # ------------------------------------------------------------ data

    def accept(self, header: p.DataHeader, num_bytes: int, now: float) -> Landing | None:
        """Check a data message before any of its bytes is copied.

        Returns what may be written, or None; whatever fails a check is counted.
        """
        transfer = self._transfers.get(header.transfer)
        block_size = self.identity.layout.block_size
        objection = ""
        if transfer is None or transfer.state is not State.GRANTED:
            objection = "transfer"
        elif not hmac.compare_digest(header.secret, transfer.secret):
            objection = "secret"
        elif header.destination_epoch != self.identity.epoch:
            objection = "epoch"
        elif not 1 <= header.round <= transfer.round:
            objection = "round"
        elif header.wire != self._wire:
            objection = "wire"
        elif num_bytes != len(header.blocks) * self._block_bytes:
            objection = "size"
        if objection or transfer is None:
            # The fence behind a transfer that has just arrived is no surprise.
            if header.blocks or objection != "transfer":
                self._stats.dropped[objection] += 1
            return None
        if not header.blocks:
            transfer.fenced_round = max(transfer.fenced_round, header.round)
            self._repair(transfer, now)
            return None
        if header.end is not None:
            self._take_end(transfer, header, header.end, now)
        slots: list[int | None] = []
        for block in header.blocks:
            objection = transfer.objection(block, block_size)
            if objection:
                self._stats.dropped[objection] += 1
                slots.append(None)
            else:
                transfer.writing.add(block.position)
                slots.append(block.slot)
        if all(slot is None for slot in slots):
            self._settle(transfer, header, now)
            return None
        return Landing(transfer, header, tuple(slots))

    def _take_end(self, transfer: Incoming, header: p.DataHeader, end: p.End, now: float) -> None:
        """What came before this message has landed or is lost; what is in it is not."""
        first = end.read()
        if first is None:
            self._stats.digest_errors += 1
            return
        self._take_first(transfer, first, now)
        transfer.fenced_round = max(transfer.fenced_round, header.round)

    def _take_first(self, transfer: Incoming, first: tuple[First, ...], now: float) -> None:
        """What is still missing is on its way now, however long it took to compute."""
        if transfer.first is None:
            transfer.moved_at = now
        transfer.first = first

    def landed(self, landing: Landing, digests: Sequence[int | None], now: float) -> None:
        """The copy of an accepted message is over. `digests` are of the slabs as written, None
        for one that was not written as a whole. Nothing may be written after this call."""
        transfer = landing.transfer
        fresh = False
        for block, slot, digest in zip(landing.header.blocks, landing.slots, digests, strict=True):
            if slot is None:
                continue
            transfer.writing.remove(block.position)
            if digest is None:
                self._stats.dropped["incomplete"] += 1
                continue
            if digest != block.digest:
                self._stats.digest_errors += 1
                continue
            transfer.landed.add(block.position)
            fresh = True
            self._stats.blocks_received += 1
            self._stats.bytes_received += self._block_bytes
        if fresh:
            transfer.moved_at = transfer.source.moved_at = now
        if transfer.state is State.ENDING:
            if not transfer.writing:
                self._give_back(transfer)
            return
        self._settle(transfer, landing.header, now)

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Renew leases, end what took too long. Call it every resend_s / 5."""
        self._ended.expire(now)
        self._ended_keys.expire(now)
        window = self._window()
        for source in self._sources:
            if self._sources.is_over(source, now):
                self._lose(source, "peer", "gone", now)
                continue
            for transfer in list(source.transfers.values()):
                self._tick_transfer(source, transfer, now)
            named = [t.id for t in source.transfers.values() if t.state is State.GRANTED]
            if named and now - source.renewed_at >= self._timers.renew_s:
                source.renewed_at = now
                source.renewal += 1
                self.outbox.append((source.route, p.Renew(source.renewal, tuple(named), window)))

    def _tick_transfer(self, source: Source, transfer: Incoming, now: float) -> None:
        stall_s = self._timers.stall_s
        if transfer.state is State.GRANTED:
            patience_s = max(stall_s, 3 * source.step_s)
            moved_at = max(transfer.moved_at, source.moved_at)
            if now - max(moved_at, source.stepped_at) > patience_s:
                self._end(transfer, "stalled", "stalled", now)
            elif transfer.first is not None and now - moved_at > patience_s:
                self._end(transfer, "incomplete", "incomplete", now)
        elif now - transfer.begun_at > stall_s:
            self._end(transfer, "stalled", "stalled", now)
        elif transfer.is_owed:
            transfer.is_owed = False
            self.outbox.append((source.route, p.Waiting(transfer.id)))

    # ------------------------------------------------------------ helpers

    def _window(self) -> int:
        """Bytes that each sender may have under way, so that all together stay bounded."""
        senders = sum(1 for source in self._sources if source.transfers)
        return min(self.window, p.WORKER_WINDOW_BYTES // max(1, senders))

    def _welcome(self, data: dict[str, str]) -> p.Welcome:
        return p.Welcome(
            id=self.identity.id,
            epoch=self.identity.epoch,
            window=self._window(),
            wire=self._wire,
            data=data,
        )

    def _is_taken(self, key: Key) -> bool:
        return key in self._keys or self._ended_keys.get(key) is not None

    def _settle(self, transfer: Incoming, header: p.DataHeader, now: float) -> None:
        """After a data message: is it the last one, what of it is there, what is missing?"""
        if not self._arrive(transfer, now):
            self._report(transfer, header)
            self._repair(transfer, now)

    def _report(self, transfer: Incoming, header: p.DataHeader) -> None:
        """Blocks that had landed before are named again: the first Landed may have been lost."""
        there = tuple(b.position for b in header.blocks if b.position in transfer.landed)
        self.outbox.append((transfer.source.route, p.Landed(transfer.id, there)))

    def _send_ticket(self, transfer: Incoming) -> None:
        source = transfer.source
        slots = tuple(transfer.slots[position] for position in transfer.missing())
        ticket = p.Ticket(transfer.id, transfer.round, transfer.secret, source.renewal, slots)
        self.outbox.append((source.route, ticket))

    def _repair(self, transfer: Incoming, now: float) -> None:
        """After Close and fence of a round: what is missing was lost, ask for it again."""
        if transfer.first is not None and transfer.fenced_round == transfer.round:
            if transfer.missing():
                self._next_round(transfer, now)

    def _next_round(self, transfer: Incoming, now: float) -> None:
        if transfer.round >= MAX_ROUNDS:
            self._end(transfer, "incomplete", "incomplete", now)
            return
        transfer.round += 1
        self._stats.rounds_repeated += 1
        self._send_ticket(transfer)

    def _arrive(self, transfer: Incoming, now: float) -> bool:
        if not transfer.is_complete or transfer.first is None:
            return False
        assert not transfer.writing, transfer.writing
        num_bytes = len(transfer.landed) * self._block_bytes
        self._stats.arrived += 1
        self.events.append(Arrived(transfer.key, transfer.first, num_bytes))
        self._forget(transfer, p.Ack(transfer.id), now)
        return True

    def _end(self, transfer: Incoming, reason: str, nack: str, now: float) -> None:
        """Stop accepting at once; give the grant back when no copy is under way."""
        transfer.state = State.ENDING
        transfer.reason = reason
        self._forget(transfer, p.Nack(transfer.id, nack), now)
        if not transfer.writing:
            self._give_back(transfer)

    def _give_back(self, transfer: Incoming) -> None:
        self._return(transfer.key, tuple(sorted(transfer.landed)), transfer.reason)

    def _return(self, key: Key, landed: tuple[int, ...], reason: str) -> None:
        self._stats.returned[reason] += 1
        self.events.append(Returned(key, landed, reason))

    def _forget(self, transfer: Incoming, answer: p.Ack | p.Nack, now: float) -> None:
        """From here on late messages are answered from memory."""
        del self._transfers[transfer.id]
        del self._keys[transfer.key]
        del transfer.source.transfers[transfer.id]
        self._ended.add(transfer.id, answer, now)
        self._ended_keys.add(transfer.key, transfer.id, now)
        self.outbox.append((transfer.source.route, answer))

    def _lose(self, source: Source, reason: str, nack: str, now: float) -> None:
        for transfer in list(source.transfers.values()):
            self._end(transfer, reason, nack, now)
        self._sources.remove(source)
