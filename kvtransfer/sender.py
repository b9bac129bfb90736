"""The sending half of an endpoint as a pure state machine: no sockets, no clock.

Called by `Endpoint` (and by the simulation in the tests): commands of the engine, messages of
receivers and the passing of time go in; `outbox`, `events` and `next_shipment` come out. The
bytes of a block are read only between its Offer and the end of its transfer.

    Open -> Begin ... Ticket -> blocks as they are offered -> Close ... Ack -> Delivered
                \\ Nack, stall, lease over, peer lost -> Broken

Each Open ends in exactly one Delivered, Broken or Abort. What Close says goes with the last blocks
where it can (`Outgoing`). It also carries what this worker asks of others (Fetch): an answer that
is no Declined is a Begin, which the receiving half takes.
"""

from collections import deque
from collections.abc import Mapping
from random import Random

from common.messages import Peer
from kvtransfer import protocol as p
from kvtransfer.commands import (
    Abort,
    BlockRef,
    Broken,
    Close,
    Declined,
    Delivered,
    EndFetch,
    Fetch,
    Key,
    Offer,
    Open,
    SenderCommand,
    SenderEvent,
    Ticketed,
)
from kvtransfer.identity import EndpointIdentity
from kvtransfer.memory import BlockMemory
from kvtransfer.outgoing import Cut, Outgoing, Shipment
from kvtransfer.outgoing_link import Asking, OutgoingLink
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from kvtransfer.tombstones import Tombstones

_NACKS = {"epoch": "peer", "reset": "peer", "stalled": "stalled", "incomplete": "incomplete"}
"""Reasons of Nack that are not `refused` for the engine."""


class Sender:
    """All outgoing transfers of one endpoint, by link.

    `random` draws the transfer ids (64-bit, never reused). `outbox` holds (peer, message) pairs
    that the caller takes away and may lose; `events` go to the engine in order and must not be.
    """

    def __init__(
        self,
        identity: EndpointIdentity,
        memory: BlockMemory,
        timers: Timers,
        stats: TransferStats,
        random: Random,
    ) -> None:
        self.identity = identity
        self.address = ""
        self.transports: tuple[str, ...] = ()
        """Over which data can be sent, for Hello."""
        self.links: dict[Peer, OutgoingLink] = {}
        self.outbox: deque[tuple[Peer, p.ToReceiver]] = deque()
        self.events: deque[SenderEvent] = deque()
        self._memory = memory
        self._timers = timers
        self._stats = stats
        self._random = random
        self._keys: dict[Key, tuple[OutgoingLink, Outgoing]] = {}
        self._fetches: dict[Key, OutgoingLink] = {}
        self._ended: Tombstones[int, str] = Tombstones(timers.tombstone_s)
        self._steps = 0
        self._step_s = 0.0

    @property
    def num_live(self) -> int:
        return len(self._keys)

    def is_live(self, peer: Peer, transfer: int) -> bool:
        """Whether the blocks of this transfer to `peer` may be read."""
        link = self.links.get(peer)
        return link is not None and transfer in link.transfers

    # ------------------------------------------------------------ from the engine

    def command(self, command: SenderCommand, now: float) -> None:
        """Commands for a transfer that has ended meanwhile are ignored: its Broken is on the
        way."""
        match command:
            case Open():
                self._open(command, now)
            case Offer(key, blocks):
                self._offer(key, blocks, now)
            case Close(key, first):
                if key in self._keys:
                    link, transfer = self._keys[key]
                    assert len(transfer.offered) == transfer.num_blocks, (key, transfer.num_blocks)
                    transfer.first = first
                    transfer.complete_at = now
                    self._close(link, transfer, now)
            case Abort(key, reason):
                if key in self._keys:
                    link, transfer = self._keys[key]
                    self._forget(link, transfer, reason, now)
            case Fetch():
                self._fetch(command, now)
            case EndFetch(key):
                if key in self._fetches:
                    del self._fetches.pop(key).fetches[key]

    def set_progress(self, steps: int, step_s: float) -> None:
        self._steps, self._step_s = steps, step_s

    def reset(self, identity: EndpointIdentity, now: float) -> None:
        """Begin a new life: every transfer is Broken("reset"), every link is dropped."""
        self.identity = identity
        for link in list(self.links.values()):
            self._drop(link, "reset", "the endpoint was reset", now)

    def _open(self, command: Open, now: float) -> None:
        assert command.key not in self._keys, command.key
        assert command.num_tokens > 0, command
        link = self._link(command.peer, now)
        transfer = Outgoing(
            key=command.key,
            id=self._random.getrandbits(63),
            num_tokens=command.num_tokens,
            num_blocks=-(-command.num_tokens // self.identity.layout.block_size),
            answered_at=now,
        )
        link.shape(transfer)
        link.transfers[transfer.id] = transfer
        link.used_at = now
        self._keys[command.key] = (link, transfer)
        if link.up:
            self._begin(link, transfer, now)

    def _fetch(self, command: Fetch, now: float) -> None:
        assert command.key not in self._fetches, command.key
        link = self._fetches[command.key] = self._link(command.peer, now)
        link.fetches[command.key] = Asking(command.hashes)
        link.used_at = now
        self._ask(link, now)

    def _ask(self, link: OutgoingLink, now: float) -> None:
        """Say each Fetch (again) that is due."""
        for key, asking in link.fetches.items():
            if link.up and now - asking.asked_at >= self._timers.resend_s:
                asking.asked_at = now
                self.outbox.append((link.peer, p.Fetch(key, asking.hashes)))

    def _link(self, peer: Peer, now: float) -> OutgoingLink:
        if peer not in self.links:
            self.links[peer] = OutgoingLink(peer, down_since=now)
        return self.links[peer]

    def _offer(self, key: Key, blocks: tuple[BlockRef, ...], now: float) -> None:
        if key in self._keys:
            link, transfer = self._keys[key]
            assert transfer.first is None, f"{key} was offered blocks after its Close"
            transfer.offer(blocks, now)
            link.enlist(transfer)

    # ------------------------------------------------------------ from the connection

    def connected(self, peer: Peer, now: float) -> None:
        """The control connection is there (again)."""
        link = self.links.get(peer)
        if link is not None:
            link.lower(True, now)
            self._hello(link, now)

    def disconnected(self, peer: Peer, now: float) -> None:
        """The control connection was lost; it may come back for a while."""
        link = self.links.get(peer)
        if link is not None:
            link.lower(False, now)

    def lost(self, peer: Peer, detail: str, now: float) -> None:
        """This peer cannot be used: its transfers are Broken("peer")."""
        link = self.links.get(peer)
        if link is not None:
            self._drop(link, "peer", detail, now)

    def data_lost(self, peer: Peer, now: float) -> None:
        """The data connection was lost, and what was under way on it perhaps too."""
        link = self.links.get(peer)
        if link is not None:
            for transfer in link.transfers.values():
                self._ask_again(link, transfer, now)

    def message(self, peer: Peer, message: p.ToSender, now: float) -> None:
        link = self.links.get(peer)
        if link is None:
            self._stats.dropped["no_link"] += 1
            return
        match message:
            case p.Welcome():
                self._welcome(link, message, now)
            case p.Refused(reason, detail):
                if reason == "unknown":
                    if link.up:
                        link.lower(True, now)
                        self._hello(link, now)
                else:
                    self._drop(link, "refused", f"{reason}: {detail}", now)
            case p.Renew():
                self._renew(link, message, now)
            case p.Declined(key, reason):
                if key in link.fetches:
                    self._decline(link, key, reason)
            case p.Ticket() | p.Waiting() | p.Nack() | p.Landed() | p.Ack():
                transfer = link.transfers.get(message.transfer)
                if transfer is not None:
                    self._transfer_message(link, transfer, message, now)
                elif isinstance(message, p.Ticket | p.Waiting):
                    self._disown(link, message.transfer)

    def _transfer_message(
        self,
        link: OutgoingLink,
        transfer: Outgoing,
        message: p.Ticket | p.Waiting | p.Nack | p.Landed | p.Ack,
        now: float,
    ) -> None:
        match message:
            case p.Waiting():
                transfer.answered_at = now
            case p.Ticket():
                self._ticket(link, transfer, message, now)
            case p.Landed(_, positions):
                transfer.land(positions, now)
                link.moved_at = now
            case p.Nack(_, reason):
                self._break(link, transfer, _NACKS.get(reason, "refused"), reason, now)
            case p.Ack():
                if transfer.first is not None:
                    if transfer.sent:
                        link.moved_at = now
                    self._forget(link, transfer, "delivered", now, tell=False)
                    shipped = len(transfer.landed | transfer.wanted.keys())
                    self._stats.delivered += 1
                    self._stats.exposed_s += now - transfer.complete_at
                    assert link.cutting is not None
                    num_bytes = shipped * link.cutting.block_bytes
                    self.events.append(Delivered(transfer.key, shipped, num_bytes))
                else:
                    self._stats.dropped["early_ack"] += 1

    def _welcome(self, link: OutgoingLink, message: p.Welcome, now: float) -> None:
        if link.up:
            if (message.id, message.epoch) == (link.peer.id, link.peer.epoch):
                link.data = message.data  # where data go has changed, for the next connection
            return
        objection = link.welcome(message, self.identity.layout, self._memory.block_bytes)
        if objection:
            self._drop(link, "peer", objection, now)
            return
        for transfer in link.transfers.values():
            transfer.answered_at = now
            self._ask_again(link, transfer, now)
        self._ask(link, now)

    def _ticket(self, link: OutgoingLink, transfer: Outgoing, ticket: p.Ticket, now: float) -> None:
        if ticket.round <= transfer.round:
            return
        if not transfer.accepts(ticket):
            self._stats.dropped["ticket"] += 1
            return
        if transfer.round == 0:
            self.events.append(Ticketed(transfer.key, len(ticket.slots)))
        transfer.take(ticket, now)
        transfer.lease_until = now + self._timers.lease_s
        link.enlist(transfer)
        self._close(link, transfer, now)

    def _renew(self, link: OutgoingLink, message: p.Renew, now: float) -> None:
        named = set(message.transfers)
        link.window = message.window
        for transfer in list(link.transfers.values()):
            if transfer.round == 0:
                continue
            if transfer.id in named:
                transfer.lease_until = now + self._timers.lease_s
            elif message.number > transfer.renewal and transfer.closed_at is None:
                # Once Close was sent the answer to it (Ack or Nack) decides.
                self._break(link, transfer, "lease", "the receiver let go of it", now)
        for unknown in named - link.transfers.keys():
            self._disown(link, unknown)

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Repeat what was not answered, end what took too long. Call it every resend_s / 5."""
        self._ended.expire(now)
        for link in list(self.links.values()):
            for transfer in list(link.transfers.values()):
                self._tick_transfer(link, transfer, now)
            self._tick_link(link, now)

    def _tick_link(self, link: OutgoingLink, now: float) -> None:
        if link.needs_hello(now, self._timers):
            self._hello(link, now)
        if link.is_lost(now, self._timers):
            self._drop(link, "peer", f"{link.peer.address} cannot be reached", now)
            return
        self._ask(link, now)
        if link.transfers or link.fetches:
            link.used_at = now
        elif now - link.used_at > self._timers.idle_s:
            self._drop(link, "peer", "idle", now)
            return
        held = any(transfer.round for transfer in link.transfers.values())
        if link.up and held and now - link.progress_at >= self._timers.progress_s:
            link.progress_at = now
            self.outbox.append((link.peer, p.Progress(self._steps, self._step_s)))

    def _tick_transfer(self, link: OutgoingLink, transfer: Outgoing, now: float) -> None:
        timers = self._timers
        if transfer.asking and link.up and now - transfer.begun_at >= timers.resend_s:
            self._begin(link, transfer, now)
        if transfer.round == 0:
            if link.up and now - transfer.answered_at > timers.stall_s:
                self._break(link, transfer, "peer", "no answer to Begin", now)
            return
        if now > transfer.lease_until:
            self._break(link, transfer, "lease", "the lease was not renewed", now)
            return
        if transfer.is_waiting:
            # Blocks of other transfers that land show that the path works: slow is no stall.
            still = now - max(transfer.moved_at, link.moved_at)
            if still > timers.stall_s:
                self._break(link, transfer, "stalled", f"nothing landed for {still:.1f} s", now)
                return
            if still > timers.stall_s / 2:
                self._ask_again(link, transfer, now)
        self._close(link, transfer, now)

    # ------------------------------------------------------------ data

    @property
    def has_data(self) -> bool:
        """Whether any transfer may have something to ship."""
        return any(link.ring for link in self.links.values())

    def next_shipment(self, peer: Peer, now: float, in_place: bool = False) -> Shipment | None:
        """The next data message to this peer, round-robin over its transfers; None if nothing
        is queued or the window is full. The caller must send it. `in_place`: to a receiver that
        reads this side's pool itself."""
        cut = self.next_cut(peer, now)
        if cut is None:
            return None
        places = {ref.position: ref.block for ref in cut.sources}
        shipment = self.load(peer, cut, places, in_place)
        assert shipment is not None, cut
        return shipment

    def next_cut(self, peer: Peer, now: float, places: int | None = None) -> Cut | None:
        """The first half of `next_shipment`, for blocks that are copied before they are sent, to
        at most `places` places. Its blocks count as sent."""
        link = self.links.get(peer)
        cut = link.next_cut(now, places) if link is not None else None
        if link is not None and cut is not None:
            self._close(link, cut.transfer, now)
        return cut

    def load(
        self, peer: Peer, cut: Cut, places: Mapping[int, int], in_place: bool = False
    ) -> Shipment | None:
        """The second half: the message, with its blocks at `places` (by position) of the memory
        of this endpoint. None if it is not wanted any more: its transfer ended, or went on to
        another round."""
        link = self.links.get(peer)
        transfer = cut.transfer
        if link is None or not link.up or link.transfers.get(transfer.id) is not transfer:
            return None
        if cut.round != transfer.round:
            return None
        assert link.cutting is not None
        shipment = transfer.load(cut, self._memory, places, peer.epoch, in_place)
        count = len(cut.positions)
        self._stats.blocks_sent += count
        self._stats.bytes_sent += count * link.cutting.block_bytes
        return shipment

    # ------------------------------------------------------------ helpers

    def _hello(self, link: OutgoingLink, now: float) -> None:
        link.hello_at = now
        self.outbox.append((link.peer, self.identity.hello(self.address, self.transports)))

    def _begin(self, link: OutgoingLink, transfer: Outgoing, now: float) -> None:
        transfer.begun_at = now
        begin = p.Begin(
            key=transfer.key,
            transfer=transfer.id,
            source_epoch=self.identity.epoch,
            destination_epoch=link.peer.epoch,
            num_tokens=transfer.num_tokens,
            round=transfer.round,
        )
        self.outbox.append((link.peer, begin))

    def _ask_again(self, link: OutgoingLink, transfer: Outgoing, now: float) -> None:
        """Ask for a first ticket, or for a next round if something is under way or closed."""
        if transfer.round == 0 or transfer.sent:
            transfer.asking = True
            if link.up and now - transfer.begun_at >= self._timers.resend_s:
                self._begin(link, transfer, now)

    def _close(self, link: OutgoingLink, transfer: Outgoing, now: float) -> None:
        """Send Close (again), with a fence behind the data, if it is time for it."""
        if not transfer.is_complete or not link.up or transfer.first is None:
            return
        if transfer.closed_at is None:
            transfer.moved_at = now
        elif now - transfer.closed_at < self._timers.resend_s:
            return
        transfer.closed_at = now
        count = len(transfer.wanted)
        close = p.Close(transfer.id, transfer.round, count, transfer.first)
        self.outbox.append((link.peer, close))
        transfer.fence = True
        link.enlist(transfer)

    def _disown(self, link: OutgoingLink, transfer: int) -> None:
        """The receiver holds slots for a transfer that has ended here."""
        reason = self._ended.get(transfer) or "gone"
        if reason != "delivered":
            self.outbox.append((link.peer, p.AbortTransfer(transfer, reason)))

    def _break(
        self, link: OutgoingLink, transfer: Outgoing, reason: str, detail: str, now: float
    ) -> None:
        if reason == "stalled" and transfer.is_waiting:
            link.stalled_at = now
        self._forget(link, transfer, reason, now)
        self._stats.broken[reason] += 1
        self.events.append(Broken(transfer.key, reason, detail))

    def _forget(
        self, link: OutgoingLink, transfer: Outgoing, reason: str, now: float, tell: bool = True
    ) -> None:
        del link.transfers[transfer.id]
        del self._keys[transfer.key]
        if transfer in link.ring:
            link.ring.remove(transfer)
        self._ended.add(transfer.id, reason, now)
        if tell:
            self.outbox.append((link.peer, p.AbortTransfer(transfer.id, reason)))

    def _drop(self, link: OutgoingLink, reason: str, detail: str, now: float) -> None:
        """End a link and every transfer and fetch on it."""
        for key in list(link.fetches):
            self._decline(link, key, detail if reason == "refused" else "peer")
        for transfer in list(link.transfers.values()):
            self._break(link, transfer, reason, detail, now)
        del self.links[link.peer]

    def _decline(self, link: OutgoingLink, key: Key, reason: str) -> None:
        del link.fetches[key]
        del self._fetches[key]
        self.events.append(Declined(key, reason))
