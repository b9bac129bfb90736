"""What the engines of both roles do about prefixes that other workers cache: fetch and give.

Fetcher: Fetch -> Wanted -> Grant -> Arrived | Returned, then the attempt goes on with what came,
as if its own cache had held it. Whatever fails (the owner is gone, holds nothing any more, or is
too slow: `within_s`) costs no more than the time until then: the rest is computed.
Owner: Requested -> the longest run that it holds is leased -> Open, Offer, Close -> Delivered |
Broken -> the lease ends. `prefill.engine` and `decode.engine` build on this.
"""

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field

from common.blockhash import HASH_BYTES, UNIT, BlockHash, chain, pack_tokens
from common.engine import Engine, Runner
from common.events import AttemptId, Ship
from common.kv.blocks import BlockManager
from common.messages import FetchFrom, Peer
from common.metrics import WorkerMetrics
from common.schedule import Limits
from common.sequence import Sequence
from kvtransfer.commands import (
    Arrived,
    BlockRef,
    Broken,
    Close,
    Decline,
    Declined,
    Delivered,
    EndFetch,
    Fetch,
    Grant,
    Key,
    Offer,
    Open,
    Refuse,
    Requested,
    Returned,
    Revoke,
    Slot,
    Ticketed,
    Wanted,
)

RATE_WEIGHT = 0.3
"""Of the last fetch in the rate that is reported."""


@dataclass(slots=True, eq=False)
class Fetching:
    """One fetch: asked -> granted (slots lent to the I/O thread) -> over."""

    sequence: Sequence
    owner: Peer
    until: float
    """Monotonic seconds."""
    pinned: list[int] = field(default_factory=list)
    """What was cached here before the first slot."""
    slots: tuple[Slot, ...] | None = None
    granted_at: float = 0.0
    is_revoked: bool = False

    def land(self, blocks: BlockManager, landed: Collection[int]) -> int:
        """Take the slots back: what landed without a gap becomes CACHED; returns its blocks."""
        assert self.slots is not None
        kept: list[int] = []
        unbroken = True
        for position, block, generation in self.slots:
            unbroken = unbroken and position in landed
            if unbroken:
                blocks.land(block, generation, self.sequence.hashes[position])
                kept.append(block)
            else:
                blocks.give_back(block, generation)
        blocks.release(self.pinned + kept)
        return len(kept)


class FetchingEngine(Engine):
    """An engine that fetches prefixes and gives them to others."""

    def __init__(
        self, runner: Runner, blocks: BlockManager, limits: Limits, metrics: WorkerMetrics
    ) -> None:
        super().__init__(runner, blocks, limits, metrics)
        self.fetch_bps = 0.0
        """See `Load`."""
        self._fetches: dict[AttemptId, Fetching] = {}
        self._dropped: dict[AttemptId, Fetching] = {}
        """Of attempts that ended, until the slots come back."""
        self._given: dict[AttemptId, list[int]] = {}
        """Leased blocks by the fetch that they were offered to."""

    # -------------------------------------------------------- the role's part

    @abstractmethod
    def fetched(self, attempt: AttemptId) -> None:
        """The fetch of this live attempt is over, with or without success."""

    @abstractmethod
    def sends(self, attempt: AttemptId) -> bool:
        """A transfer of this name goes out from here already."""

    @property
    @abstractmethod
    def is_short(self) -> bool:
        """Who is next in the queue waits for blocks: fetches, here or elsewhere, get none."""

    def headroom(self) -> int:
        """Blocks that a fetch, here or elsewhere, must leave available."""
        return 0

    def lend(self, change: int) -> None:
        """So many more fetches (-1: one less) hold blocks that come back by themselves."""

    # -------------------------------------------------------- for the role

    def fetch(self, sequence: Sequence, source: FetchFrom) -> bool:
        """Begin to fetch a prefix of a new attempt; False if it would bring nothing."""
        usable = self._usable(sequence)
        here = self.blocks.peek(sequence.hashes[:usable])
        if here >= min(usable, source.units * UNIT // self.limits.block_size):
            return False
        key = Key(sequence.request, sequence.attempt)
        tokens = pack_tokens(sequence.tokens[: usable * self.limits.block_size])
        hashes = b"".join(chain(tokens, sequence.parent))
        self._fetches[key] = Fetching(sequence, source.peer, self.now + source.within_s)
        self.outbox.append(Ship(Fetch(key, source.peer, hashes)))
        return True

    def is_fetching(self, attempt: AttemptId) -> bool:
        return attempt in self._fetches

    def end_fetch(self, attempt: AttemptId) -> None:
        """The attempt ends; its slots are used again when the I/O thread has let them go."""
        fetching = self._fetches.pop(attempt, None)
        if fetching is None:
            return
        self.metrics.fetches.labels("dropped").inc()
        if fetching.slots is None:
            self.outbox.append(Ship(EndFetch(Key(*attempt))))
        else:
            self._dropped[attempt] = fetching
            self._revoke(attempt, fetching)

    @property
    def is_exchanging(self) -> bool:
        """Blocks are lent to fetches, here or elsewhere."""
        return bool(self._fetches or self._dropped or self._given)

    def deadline(self) -> float | None:
        times = [f.until for f in self._fetches.values() if not f.is_revoked]
        last = super().deadline()
        return min(times if last is None else [*times, last], default=None)

    def expire(self, now: float) -> None:
        super().expire(now)
        for attempt, fetching in list(self._fetches.items()):
            if now < fetching.until:
                continue
            if fetching.slots is None:
                self.outbox.append(Ship(EndFetch(Key(*attempt))))
                self._over(attempt, "late")
            else:
                self._revoke(attempt, fetching)

    def harmless(self, event: object) -> bool:
        # Of these, what ends an attempt ends one whose KV was on its way: it is in no step.
        transfers = Arrived | Declined | Delivered | Requested | Returned | Ticketed | Wanted
        return isinstance(event, transfers) or super().harmless(event)

    def take_exchange(self, event: object) -> bool:
        """Handle an event of a fetch; False if it is of something else."""
        match event:
            case Requested(key, peer, hashes):
                self._give(key, peer, hashes)
            case Wanted(key) if key in self._fetches:
                self._grant(event, self._fetches[key])
            case Arrived(key, _, num_bytes) if self._holds(key):
                fetching = self._fetches.get(key) or self._dropped[key]
                assert fetching.slots is not None, key
                self._measure(num_bytes, self.now - fetching.granted_at)
                self._end_grant(key, {slot.position for slot in fetching.slots}, "arrived")
            case Returned(key, landed, reason) if self._holds(key):
                self._end_grant(key, landed, "late" if reason == "revoked" else reason)
            case Declined(key, reason):
                if key in self._fetches and self._fetches[key].slots is None:
                    self._over(key, reason if reason in ("gone", "busy", "draining") else "peer")
            case Ticketed(key) if key in self._given:
                pass
            case Delivered(key) | Broken(key) if key in self._given:
                self.lend(-1)
                self.blocks.unlease(self._given.pop(key))
            case _:
                return False
        return True

    # -------------------------------------------------------- fetching

    def _usable(self, sequence: Sequence) -> int:
        """Blocks that `start` could take from the cache: one token is always computed."""
        return 0 if sequence.is_scored else (sequence.num_tokens - 1) // self.limits.block_size

    def _holds(self, key: AttemptId) -> bool:
        fetching = self._fetches.get(key) or self._dropped.get(key)
        return fetching is not None and fetching.slots is not None

    def _grant(self, wanted: Wanted, fetching: Fetching) -> None:
        """The owner offers its run: reserve what is missing here, all of it or nothing."""
        key, owner, sequence = wanted.key, fetching.owner, fetching.sequence
        if fetching.slots is not None:
            return
        self.outbox.append(Ship(EndFetch(key)))
        if (wanted.source.id, wanted.source.epoch) != (owner.id, owner.epoch):
            self._refuse(key, "peer")
            return
        if self.now >= fetching.until:
            self._refuse(key, "late")
            return
        count = min(self._usable(sequence), wanted.num_tokens // self.limits.block_size)
        pinned = self.blocks.match(sequence.hashes[:count])
        missing = count - len(pinned)
        reserved = None
        has_room = self.blocks.num_available >= missing + self.headroom()
        if missing and has_room and not self.is_short:
            reserved = self.blocks.reserve(missing)
        if reserved is None:
            self.blocks.release(pinned)
            self._refuse(key, "no_blocks" if missing else "gone")
            return
        fetching.pinned = pinned
        fetching.slots = tuple(
            Slot(len(pinned) + i, block, generation)
            for i, (block, generation) in enumerate(reserved)
        )
        fetching.granted_at = self.now
        self.lend(1)
        self.outbox.append(Ship(Grant(key, fetching.slots)))

    def _refuse(self, key: Key, reason: str) -> None:
        self.outbox.append(Ship(Refuse(key, "no_blocks" if reason == "no_blocks" else "gone")))
        self._over(key, reason)

    def _revoke(self, attempt: AttemptId, fetching: Fetching) -> None:
        if not fetching.is_revoked:
            fetching.is_revoked = True
            self.outbox.append(Ship(Revoke(Key(*attempt))))

    def _end_grant(self, key: AttemptId, landed: Collection[int], outcome: str) -> None:
        fetching = self._fetches.get(key) or self._dropped.pop(key)
        kept = fetching.land(self.blocks, landed)
        self.lend(-1)
        self.metrics.fetched_tokens.inc(kept * self.limits.block_size)
        if key in self._fetches:
            self._over(key, outcome)

    def _over(self, key: AttemptId, outcome: str) -> None:
        del self._fetches[key]
        self.metrics.fetches.labels(outcome).inc()
        self.fetched(key)

    def _measure(self, num_bytes: int, seconds: float) -> None:
        rate = num_bytes / max(seconds, 1e-6)
        weight = RATE_WEIGHT if self.fetch_bps else 1.0
        self.fetch_bps += weight * (rate - self.fetch_bps)

    # -------------------------------------------------------- giving

    def _give(self, key: Key, peer: Peer, hashes: bytes) -> None:
        """Offer the longest run of this chain that is held; at most half the pool is given away
        at a time, and nothing that somebody here needs now."""
        if key in self._given:
            return
        per_block = self.limits.block_size // UNIT * HASH_BYTES
        ends = range(per_block, len(hashes) + 1, per_block)
        names = [BlockHash(hashes[end - HASH_BYTES : end]) for end in ends]
        held = self.blocks.peek(names)
        given = sum(len(given) for given in self._given.values())
        spare = self.blocks.num_available - self.headroom()
        count = 0 if self.is_short else min(held, self.limits.num_blocks // 2 - given, spare)
        if self.drain_until is not None or count < 1 or self.sends(key):
            reason = "draining" if self.drain_until is not None else "busy" if held else "gone"
            self.outbox.append(Ship(Decline(key, peer, reason)))
            return
        run = self._given[key] = self.blocks.match(names[:count])
        self.blocks.lease(run)
        self.blocks.release(run)
        self.lend(1)
        size = self.limits.block_size
        refs = tuple(BlockRef(i, block, size) for i, block in enumerate(run))
        for command in (Open(key, peer, count * size), Offer(key, refs), Close(key, ())):
            self.outbox.append(Ship(command))
