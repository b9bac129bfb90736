"""A worker of the simulation: a real Sender and Receiver under two stub engines.

The stubs keep the books of the block managers and assert the invariants of the protocol:
nothing is written outside a live grant, every grant comes back exactly once, every transfer ends
exactly once, and what arrived is what was sent. Content of a block is a function of (key,
position); whatever is free is poisoned.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from common.messages import Peer
from kvtransfer.commands import (
    Abort,
    Arrived,
    BlockRef,
    Broken,
    Close,
    Decline,
    Declined,
    Delivered,
    EndFetch,
    Fetch,
    First,
    Grant,
    Key,
    Offer,
    Open,
    ReceiverCommand,
    ReceiverEvent,
    Refuse,
    Requested,
    Returned,
    Revoke,
    SenderCommand,
    SenderEvent,
    Slot,
    Wait,
    Wanted,
)
from kvtransfer.incoming import Landing
from kvtransfer.memory import digest
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from tests.kvtransfer.pool import BLOCK_SIZE, BytePool, identity

BLOCK_BYTES = 32
NUM_BLOCKS = 14
Event = SenderEvent | ReceiverEvent
RESTS = 0.12
FETCH = 2
"""`attempt` of the keys of fetches."""
Command = SenderCommand | ReceiverCommand


def first_tokens(key: Key) -> tuple[First, ...]:
    """None of a fetch."""
    return () if key.attempt == FETCH else (First(0, key.request * 7 % 1000, None),)


@dataclass(slots=True)
class Prompt:
    """A transfer as the sending engine knows it."""

    key: Key
    num_tokens: int
    blocks: list[int]
    abort_after: int | None
    """Chunks after which the engine aborts."""
    offered: int = 0
    rest: int = 0
    """Steps in which it gets no chunk."""
    aborted: bool = False

    def refs(self, count: int) -> tuple[BlockRef, ...]:
        positions = range(self.offered, min(self.offered + count, len(self.blocks)))
        return tuple(
            BlockRef(i, self.blocks[i], min(BLOCK_SIZE, self.num_tokens - i * BLOCK_SIZE))
            for i in positions
        )


@dataclass(eq=False)
class SimulatedWorker:
    """One life of one worker. `ended` tells the simulation what became of each transfer."""

    id: str
    epoch: int
    random: Random
    timers: Timers
    calm: bool = False
    """The engines neither abort, revoke nor refuse."""
    rests: float = RESTS
    """Probability that a prompt gets no chunk for a while after one."""
    alive: bool = True
    paused: bool = False
    silent_since: float | None = None
    """Since when it is dead or paused."""
    active_since: float = 0.0
    steps: int = 0
    prompts: dict[Key, Prompt] = field(default_factory=dict)
    ended: dict[Key, str] = field(default_factory=dict)
    queue: deque[Wanted] = field(default_factory=deque)
    granted: dict[Key, dict[int, Slot]] = field(default_factory=dict)
    over: set[Key] = field(default_factory=set)
    """Keys whose Arrived or Returned was emitted: no write may follow."""
    commands: deque[Command] = field(default_factory=deque)
    """On their way from the engines to the endpoint."""
    refused: set[Key] = field(default_factory=set)
    """Keys that this engine refused; a Returned may cross the Refuse."""
    inbox: deque[Event] = field(default_factory=deque)
    arrived: set[Key] = field(default_factory=set)
    asking: dict[Key, float] = field(default_factory=dict)
    """Fetches that were not answered yet, and until when they are waited for."""
    given: set[Key] = field(default_factory=set)
    """Fetches that this engine has answered as an owner."""

    def __post_init__(self) -> None:
        self.pool = BytePool(NUM_BLOCKS, BLOCK_BYTES)
        self.free = list(range(NUM_BLOCKS))
        self.generations = [0] * NUM_BLOCKS
        for block in self.free:
            self.pool.fill(block, "poison ")
        self.stats = TransferStats()
        me = identity(self.id, self.epoch)
        self.sender = Sender(me, self.pool, self.timers, self.stats, self.random)
        self.sender.address = self.id
        self.sender.transports = ("sim",)
        self.receiver = Receiver(me, BLOCK_BYTES, self.timers, self.stats, self.random)

    @property
    def peer(self) -> Peer:
        return Peer(self.id, self.epoch, self.id)

    def begin_life(self, epoch: int, now: float) -> None:
        """What a worker does that was paused for longer than the lease."""
        self.epoch = epoch
        me = identity(self.id, epoch)
        self.sender.reset(me, now)
        self.receiver.reset(me, now)

    # ------------------------------------------------------------ blocks

    def take(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        taken = [self.free.pop(self.random.randrange(len(self.free))) for _ in range(count)]
        for block in taken:
            self.generations[block] += 1
        return taken

    def put_back(self, blocks: list[int]) -> None:
        for block in blocks:
            assert block not in self.free, (self.id, block)
            self.pool.fill(block, "poison ")
            self.free.append(block)

    def check_content(self, key: Key, position: int, block: int) -> None:
        here, sent = self.pool.read(block), content(key, position)
        assert here == sent, f"{self.id}: {key} position {position}: {here!r} is not {sent!r}"

    # ------------------------------------------------------------ the sending engine

    def start(self, key: Key, to: Peer, num_tokens: int) -> Iterator[Command]:
        blocks = self.take(-(-num_tokens // BLOCK_SIZE))
        if blocks is None:
            return
        abort_after = None
        if not self.calm and self.random.random() < 0.2:
            abort_after = self.random.randrange(4)
        self.prompts[key] = Prompt(key, num_tokens, blocks, abort_after)
        yield Open(key, to, num_tokens)

    def fetch(self, key: Key, owner: Peer, num_tokens: int, until: float) -> Iterator[Command]:
        """Ask a worker for a prefix of so many tokens."""
        self.asking[key] = until
        yield Fetch(key, owner, bytes(16 * num_tokens))

    def give(self, requested: Requested) -> Iterator[Command]:
        """Offer a part of what is asked for, all at once, or nothing."""
        key = requested.key
        if key in self.given:
            return
        self.given.add(key)
        most = len(requested.hashes) // 16
        num_tokens = most if self.calm else self.random.randint(1, most)
        blocks = self.take(-(-num_tokens // BLOCK_SIZE))
        if blocks is None or (not self.calm and self.random.random() < 0.2):
            self.put_back(blocks or [])
            yield Decline(key, requested.peer, "gone")
            return
        prompt = self.prompts[key] = Prompt(key, num_tokens, blocks, None)
        refs = prompt.refs(len(blocks))
        for ref in refs:
            self.pool.slab(ref.block)[:] = content(key, ref.position)
        prompt.offered = len(refs)
        yield Open(key, requested.peer, num_tokens)
        yield Offer(key, refs)
        yield Close(key, ())

    def give_up_late(self, now: float) -> Iterator[Command]:
        """Fetches that took too long; those that were granted are revoked by chance."""
        for key, until in list(self.asking.items()):
            if now > until:
                del self.asking[key]
                yield EndFetch(key)

    def compute(self) -> Iterator[Command]:
        """One engine step: a chunk of every prompt."""
        self.steps += 1
        for prompt in self.prompts.values():
            if prompt.aborted or prompt.key.attempt == FETCH:
                continue
            if prompt.abort_after == 0:
                prompt.aborted = True
                yield Abort(prompt.key, self.random.choice(["finished", "cancel"]))
                continue
            if prompt.abort_after is not None:
                prompt.abort_after -= 1
            if prompt.rest and not self.calm:
                prompt.rest -= 1
                continue
            if self.random.random() < self.rests:
                prompt.rest = 30  # about six seconds: longer than the lease
            refs = prompt.refs(self.random.randint(1, 3))
            for ref in refs:
                self.pool.slab(ref.block)[:] = content(prompt.key, ref.position)
            prompt.offered += len(refs)
            if refs:
                yield Offer(prompt.key, refs)
                if prompt.offered == len(prompt.blocks):
                    yield Close(prompt.key, first_tokens(prompt.key))

    def cancel_one(self) -> Iterator[Command]:
        """The client of one prompt leaves."""
        prompt = self.random.choice(list(self.prompts.values()))
        if not prompt.aborted:
            prompt.aborted = True
            yield Abort(prompt.key, "cancel")

    def fenced(self, key: Key) -> None:
        """The endpoint has carried out an Abort: the blocks are not read any more."""
        self.put_back(self.prompts.pop(key).blocks)
        self.ended.setdefault(key, "aborted")

    # ------------------------------------------------------------ the receiving engine

    def take_events(self) -> Iterator[Command]:
        """What both engines do with the events so far."""
        while self.inbox:
            match self.inbox.popleft():
                case Delivered(key) | Broken(key):
                    prompt = self.prompts.get(key)
                    if prompt is not None and not prompt.aborted:
                        self.put_back(self.prompts.pop(key).blocks)
                case Requested() as requested:
                    yield from self.give(requested)
                case Declined(key):
                    self.asking.pop(key, None)
                case Wanted(key) as wanted if key.attempt == FETCH and key not in self.asking:
                    if key not in self.granted.keys() | self.over | self.refused and key not in {
                        other.key for other in self.queue
                    }:
                        self.refused.add(key)
                        yield Refuse(key, "gone")
                case Wanted() as wanted:
                    if self.asking.pop(wanted.key, None) is not None:
                        yield EndFetch(wanted.key)
                    known = {other.key for other in self.queue} | self.granted.keys()
                    if wanted.key not in known | self.over | self.refused:
                        self.queue.append(wanted)
                        yield Wait(wanted.key)
                case Arrived(key) | Returned(key):
                    self.queue = deque(wanted for wanted in self.queue if wanted.key != key)
                    slots = self.granted.pop(key, {})
                    self.put_back([slot.block for slot in slots.values()])
        yield from self.admit()
        for key in list(self.granted):
            if not self.calm and self.random.random() < 0.01:
                yield Revoke(key)

    @property
    def lacks_room(self) -> bool:
        """For the transfer that is next."""
        return len(self.free) < -(-self.queue[0].num_tokens // BLOCK_SIZE)

    def admit(self) -> Iterator[Command]:
        while self.queue:
            wanted = self.queue[0]
            if wanted.key in self.over:
                self.queue.popleft()
                continue
            if not self.calm and self.random.random() < 0.1:
                self.queue.popleft()
                self.refused.add(wanted.key)
                yield Refuse(wanted.key, "no_blocks")
                continue
            positions = range(-(-wanted.num_tokens // BLOCK_SIZE))
            missing = [p for p in positions if self.random.random() < 0.8]
            blocks = self.take(len(missing))
            if blocks is None:
                return
            slots = [Slot(p, b, self.generations[b]) for p, b in zip(missing, blocks, strict=True)]
            self.queue.popleft()
            self.granted[wanted.key] = {slot.position: slot for slot in slots}
            yield Grant(wanted.key, tuple(slots))

    # ------------------------------------------------------------ checks at the endpoint

    def read(self, blocks: Sequence[int]) -> bytes:
        return b"".join(self.pool.read(block) for block in blocks)

    def write(self, landing: Landing, blocks: Sequence[bytes | None]) -> list[int | None]:
        """The copy of an accepted message, as a transport does it."""
        digests: list[int | None] = []
        for i, (block, slot) in enumerate(zip(landing.header.blocks, landing.slots, strict=True)):
            if slot is None:
                digests.append(None)
                continue
            key = landing.transfer.key
            assert key not in self.over, f"{self.id}: {key} is written after its end"
            granted = self.granted[key][block.position]
            assert granted == (block.position, slot, block.generation), (granted, block)
            assert self.generations[slot] == block.generation, (slot, block)
            found = blocks[i]
            if found is None:
                digests.append(None)
                continue
            self.pool.slab(slot)[:] = found
            digests.append(digest(self.pool.slab(slot)))
        return digests

    def emitted(self, event: Event) -> None:
        """An event leaves the endpoint."""
        match event:
            case Delivered(key):
                assert key not in self.ended, (key, self.ended[key], event)
                self.ended[key] = "delivered"
            case Broken(key):
                assert key not in self.ended, (key, self.ended[key], event)
                self.ended[key] = "broken"
            case Arrived(key, first):
                assert key not in self.over, event
                assert first == first_tokens(key), event
                self.over.add(key)
                self.arrived.add(key)
                for position, slot in self.granted[key].items():
                    self.check_content(key, position, slot.block)
            case Returned(key, landed):
                assert key not in self.over, event
                self.over.add(key)
                for position in landed:
                    self.check_content(key, position, self.granted[key][position].block)
        self.inbox.append(event)

    @property
    def is_idle(self) -> bool:
        live = self.sender.num_live + self.receiver.num_live
        return not (self.prompts or self.granted or self.queue or self.asking or live)

    def check_idle(self) -> None:
        """Nothing is held any more."""
        assert not self.prompts, (self.id, self.prompts)
        assert not self.granted, (self.id, self.granted)
        assert not self.queue, (self.id, self.queue)
        assert not self.asking, (self.id, self.asking)
        assert sorted(self.free) == list(range(NUM_BLOCKS)), (self.id, self.free)
        assert self.sender.num_live == self.receiver.num_live == 0, self.id


def content(key: Key, position: int) -> bytes:
    return (f"{key.request}/{position} ".encode() * BLOCK_BYTES)[:BLOCK_BYTES]
