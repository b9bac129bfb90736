"""One transfer as its sender sees it. Used by `Sender` and `OutgoingLink`.

offered --(ticket wants it)--> queued --> sent --(Landed)--> landed
                                 ^          |
                                 +----------+  ticket of a later round
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from kvtransfer.commands import BlockRef, First, Key, Slot
from kvtransfer.copying import address_of, digest_blocks, gather_blocks
from kvtransfer.cutting import Cutting, Piece
from kvtransfer.memory import BlockMemory
from kvtransfer.protocol import DataBlock, DataHeader, End, Ticket, Wire

MAX_FIRST = 128
"""First tokens that the header of a data message carries; more, or such with their probabilities,
have a message of their own, so that the header stays small."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """A data message to be sent: its header, and where its bytes are: in runs of pool blocks; or,
    if the receiver's blocks have another size, in pieces of them."""

    header: DataHeader
    runs: tuple[tuple[int, int], ...]
    """(first block, number of consecutive blocks) of the sender's pool."""
    pieces: tuple[Piece, ...] = ()
    """Of each of the receiver's blocks, one piece for each 16 tokens."""
    staged: memoryview | None = None
    """The bytes of the pieces, put together; None if the receiver does that."""

    def parts(self, memory: BlockMemory) -> list[memoryview]:
        """The bytes of this message, for transports that carry them."""
        if self.staged is not None:
            return [self.staged]
        assert not self.pieces, "to be put together by a receiver that maps the pool"
        return [memory.run(block, count) for block, count in self.runs]


@dataclass(frozen=True, slots=True)
class Cut:
    """What the next data message of a transfer is made of; without positions it is a fence."""

    transfer: "Outgoing"
    round: int
    positions: tuple[int, ...]
    """Of the receiver's blocks."""
    sources: tuple[BlockRef, ...]
    """The blocks of this side that are needed for them."""
    end: End | None = None


@dataclass(slots=True, eq=False)
class Outgoing:
    """State of one transfer. Times are of the caller's monotonic clock."""

    key: Key
    id: int
    num_tokens: int
    num_blocks: int
    """Of this side: so many are offered."""
    answered_at: float
    """When the receiver last said that it is alive (only counts until the ticket)."""
    cutting: Cutting | None = None
    """From this side's blocks to the receiver's; known once it said Welcome. From there on
    positions are the receiver's, but for `offered`."""
    wire: Wire | None = None
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
        if self.cutting is None:
            return False
        num_blocks = self.cutting.num_blocks(self.num_tokens)
        positions = {slot.position for slot in ticket.slots}
        return len(positions) == len(ticket.slots) and all(
            0 <= position < num_blocks for position in positions
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
        self.queued = deque(sorted(filter(self._is_there, self.wanted)))
        self.closed_at = None
        self.fence = False
        self.moved_at = now

    def offer(self, blocks: Sequence[BlockRef], now: float) -> None:
        for ref in blocks:
            assert 0 <= ref.position < self.num_blocks, (ref, self.num_blocks)
            assert ref.position not in self.offered, ref
            self.offered[ref.position] = ref
        if self.cutting is None:
            return
        for position in sorted(self.cutting.touched(ref.position for ref in blocks)):
            if position in self.wanted and self._is_there(position):
                if not self.is_waiting:
                    self.moved_at = now
                self.queued.append(position)

    def _is_there(self, position: int) -> bool:
        """All of the receiver's block at `position` was offered."""
        assert self.cutting is not None
        if self.cutting.is_whole:  # the same, without the pieces
            return position in self.offered
        sources = self.cutting.sources(position, self.num_tokens)
        return all(source in self.offered for source, _ in sources)

    def land(self, positions: Iterable[int], now: float) -> None:
        for position in positions:
            if position in self.sent:
                self.sent.remove(position)
                self.landed.add(position)
                self.moved_at = now

    def cut(self, count: int, now: float, places: int | None) -> Cut | None:
        """Take `count` blocks from the queue, or as many as can be made of `places` blocks of this
        side; None if that is not even one."""
        assert self.cutting is not None
        if places is not None:
            if self.cutting.is_whole:
                count = min(count, places)
            while count and len(self._sources(list(islice(self.queued, count)))) > places:
                count -= 1
            if not count:
                return None
        positions = tuple(self.queued.popleft() for _ in range(count))
        if not self.sent:
            self.moved_at = now
        self.sent.update(positions)
        sources = tuple(self.offered[at] for at in self._sources(positions))
        end = self._end()
        if end is not None:
            self.closed_at = self.moved_at = now
        return Cut(self, self.round, positions, sources, end)

    def _end(self) -> End | None:
        """What the message that takes the last blocks of the queue says in place of Close."""
        if self.first is None or self.queued or len(self.first) > MAX_FIRST:
            return None
        if any(first.logprob is not None for first in self.first):
            return None
        return End.of(self.first)

    def cut_fence(self) -> Cut:
        self.fence = False
        return Cut(self, self.round, (), ())

    def _sources(self, positions: Sequence[int]) -> list[int]:
        """This side's positions of the blocks that these of the receiver are made of."""
        assert self.cutting is not None
        if self.cutting.is_whole:
            return list(positions)
        of = [self.cutting.sources(position, self.num_tokens) for position in positions]
        return list(dict.fromkeys(at for sources in of for at, _ in sources))

    def load(
        self,
        cut: Cut,
        memory: BlockMemory,
        places: Mapping[int, int],
        epoch: int,
        in_place: bool,
    ) -> Shipment:
        """The message of a cut, for a receiver of this epoch. `places`: where in `memory` the
        blocks of its sources are, by position; `in_place`: the receiver reads them there."""
        assert self.cutting is not None and cut.round == self.round, (cut, self.round)
        if not cut.positions:
            return Shipment(self._header((), epoch), ())
        if not self.cutting.is_whole:
            return self._cut_pieces(cut, self.cutting, memory, places, epoch, in_place)
        runs: list[tuple[int, int]] = []
        for position in cut.positions:
            block = places[position]
            if runs and sum(runs[-1]) == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        self._digest(cut.positions, runs, memory)
        return Shipment(self._header(cut.positions, epoch, cut.end), tuple(runs))

    def _cut_pieces(
        self,
        cut: Cut,
        cutting: Cutting,
        memory: BlockMemory,
        places: Mapping[int, int],
        epoch: int,
        in_place: bool,
    ) -> Shipment:
        """A shipment of blocks of another size than this side's. They are digested as they are
        put together, or without that where the receiver does it."""
        positions = cut.positions
        pieces: list[Piece] = []
        for position in positions:
            sources = cutting.sources(position, self.num_tokens)
            pieces += [Piece(places[at], unit) for at, unit in sources]
            pieces += [Piece(-1, 0)] * (cutting.pieces - len(sources))
        staged, slabs = None, None
        if not in_place:
            staged = np.empty(len(positions) * cutting.block_bytes, dtype=np.uint8).data
            starts = range(0, len(staged), cutting.block_bytes)
            slabs = [staged[start : start + cutting.block_bytes] for start in starts]
        if slabs is not None or any(position not in self.digests for position in positions):
            base = address_of(memory.slab(0))
            digests = gather_blocks(cutting, memory.slab, base, pieces, slabs)
            for position, digest in zip(positions, digests, strict=True):
                assert digest is not None
                self.digests.setdefault(position, digest)
        return Shipment(self._header(positions, epoch, cut.end), (), tuple(pieces), staged)

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

    def _header(self, positions: Iterable[int], epoch: int, end: End | None = None) -> DataHeader:
        assert self.cutting is not None and self.wire is not None
        blocks = []
        for position in positions:
            slot, digest = self.wanted[position], self.digests[position]
            fill = self.cutting.fill(position, self.num_tokens)
            blocks.append(DataBlock(position, slot.block, slot.generation, fill, digest))
        return DataHeader(self.id, self.secret, epoch, self.round, tuple(blocks), self.wire, end)
