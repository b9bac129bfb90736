"""One transfer as its sender sees it. Used by `Sender` and `OutgoingLink`.

offered --(ticket wants it)--> queued --> sent --(Landed)--> landed
                                 ^          |
                                 +----------+  ticket of a later round
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from kvtransfer.commands import BlockRef, First, Key, Slot
from kvtransfer.copying import digest_blocks
from kvtransfer.memory import BlockMemory
from kvtransfer.protocol import DataBlock, DataHeader, Ticket


@dataclass(frozen=True, slots=True)
class Shipment:
    """A data message to be sent: its header and the runs of pool blocks that make its bytes."""

    header: DataHeader
    runs: tuple[tuple[int, int], ...]
    """(first block, number of consecutive blocks) of the sender's pool."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """State of one transfer. Times are of the caller's monotonic clock."""

    key: Key
    id: int
    num_tokens: int
    num_blocks: int
    answered_at: float
    """When the receiver last said that it is alive (only counts until the ticket)."""
    asking: bool = True
    """A ticket of a later round is wanted: Begin is repeated."""
    begun_at: float = float("-inf")
    round: int = 0
    secret: bytes = b""
    renewal: int = 0
    lease_until: float = 0.0
    wanted: dict[int, Slot] = field(default_factory=dict)
    offered: dict[int, BlockRef] = field(default_factory=dict)
    digests: dict[int, int] = field(default_factory=dict)
    queued: deque[int] = field(default_factory=deque)
    sent: set[int] = field(default_factory=set)
    landed: set[int] = field(default_factory=set)
    first: tuple[First, ...] | None = None
    complete_at: float = 0.0
    """When the engine said that everything was offered."""
    closed_at: float | None = None
    """When Close was last sent in this round."""
    fence: bool = False
    moved_at: float = 0.0
    """When something last landed, or the wait for it began."""

    @property
    def is_complete(self) -> bool:
        """Everything was offered and sent: the receiver may take over."""
        return self.first is not None and self.round > 0 and not self.queued

    @property
    def is_waiting(self) -> bool:
        """The receiver owes something, so that silence means a stall."""
        return self.round > 0 and bool(self.queued or self.sent or self.closed_at is not None)

    def accepts(self, ticket: Ticket) -> bool:
        """Whether the ticket names blocks of this transfer, each once."""
        positions = {slot.position for slot in ticket.slots}
        return len(positions) == len(ticket.slots) and all(
            0 <= position < self.num_blocks for position in positions
        )

    def take(self, ticket: Ticket, now: float) -> None:
        """Start the round of a new ticket: what it wants and is offered is sent (again)."""
        assert ticket.round > self.round, (ticket.round, self.round)
        self.landed |= self.wanted.keys()
        self.wanted = {slot.position: slot for slot in ticket.slots}
        self.landed -= self.wanted.keys()
        self.round = ticket.round
        self.secret = ticket.secret
        self.renewal = ticket.renewal
        self.asking = False
        self.sent.clear()
        self.queued = deque(sorted(self.wanted.keys() & self.offered.keys()))
        self.closed_at = None
        self.fence = False
        self.moved_at = now

    def offer(self, blocks: Iterable[BlockRef], now: float) -> None:
        for ref in blocks:
            assert 0 <= ref.position < self.num_blocks, (ref, self.num_blocks)
            assert ref.position not in self.offered, ref
            self.offered[ref.position] = ref
            if ref.position in self.wanted:
                if not self.is_waiting:
                    self.moved_at = now
                self.queued.append(ref.position)

    def land(self, positions: Iterable[int], now: float) -> None:
        for position in positions:
            if position in self.sent:
                self.sent.remove(position)
                self.landed.add(position)
                self.moved_at = now

    def cut(self, count: int, memory: BlockMemory, epoch: int, now: float) -> Shipment:
        """Take `count` blocks from the queue, for a receiver of this epoch."""
        positions = [self.queued.popleft() for _ in range(count)]
        runs: list[tuple[int, int]] = []
        for position in positions:
            block = self.offered[position].block
            if runs and sum(runs[-1]) == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        self._digest(positions, runs, memory)
        if not self.sent:
            self.moved_at = now
        self.sent.update(positions)
        return Shipment(self._header(positions, epoch), tuple(runs))

    def _digest(
        self, positions: Sequence[int], runs: Sequence[tuple[int, int]], memory: BlockMemory
    ) -> None:
        """Digest the blocks of these runs, once: they do not change while they are offered."""
        left = iter(positions)
        for start, count in runs:
            part = list(islice(left, count))
            if any(position not in self.digests for position in part):
                run = memory.run(start, count)
                self.digests.update(zip(part, digest_blocks(run, memory.block_bytes), strict=True))

    def cut_fence(self, epoch: int) -> Shipment:
        self.fence = False
        return Shipment(self._header((), epoch), ())

    def _header(self, positions: Iterable[int], epoch: int) -> DataHeader:
        blocks = []
        for position in positions:
            slot, ref = self.wanted[position], self.offered[position]
            digest = self.digests[position]
            blocks.append(DataBlock(position, slot.block, slot.generation, ref.fill, digest))
        return DataHeader(self.id, self.secret, epoch, self.round, tuple(blocks))
