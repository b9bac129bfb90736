"""Which sequences a decode worker computes next, and who gets blocks.

Everything that needs blocks stands in one queue in order of arrival: prompts to be prefilled
here, preempted sequences, and handovers whose prefill worker asked for slots. The head of the
queue is never overtaken for blocks, nor do fetches get any while it waits for them (`is_short`), so
nothing starves. When a running sequence needs a block and there is none, the newest one is
preempted; the oldest always goes on, so nothing livelocks. Used by `decode.engine`, in its thread.
"""

from bisect import insort
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from common.kv.blocks import BlockManager
from common.schedule import Chunk, Limits, chunk_size, start, stop
from common.sequence import Sequence
from decode.handover import Handover
from kvtransfer.commands import Slot


@dataclass(slots=True)
class Plan:
    """What one turn decided."""

    chunks: list[Chunk] = field(default_factory=list)
    granted: list[Handover] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Fork(NamedTuple):
    """One choice of a computed prompt. The block `source` is to be copied to `target` before the
    next step; equal if there is nothing to copy."""

    sequence: Sequence
    source: int
    target: int


def order(candidate: "Sequence | Handover") -> tuple[int, int, int]:
    """Those of lower priority value first, then older attempts, then lower choices."""
    return candidate.priority, candidate.arrival, candidate.choices[0]


class DecodeScheduler:
    """The queue, the granted handovers and the running sequences of one worker."""

    def __init__(self, blocks: BlockManager, limits: Limits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.waiting: list[Sequence | Handover] = []
        self.receiving: list[Handover] = []
        self.running: list[Sequence] = []
        self.num_lent = 0
        """Fetches, here or elsewhere, and dropped attempts whose blocks the I/O thread has."""
        self._short: Sequence | Handover | None = None
        """Found too few blocks when it was last its turn."""

    @property
    def is_short(self) -> bool:
        """The head of the queue waits for blocks."""
        return self._short in self.waiting

    @property
    def num_seats(self) -> int:
        """Sequences that run, or will once their KV arrived."""
        return len(self.running) + sum(len(h.choices) for h in self.receiving)

    def add(self, candidate: Sequence | Handover) -> None:
        insort(self.waiting, candidate, key=order)

    def remove(self, candidate: Sequence | Handover) -> None:
        """The sequence ended, or the handover is over: it holds no blocks afterwards, except
        granted slots, which the I/O thread gives back."""
        if isinstance(candidate, Handover):
            (self.waiting if candidate.slots is None else self.receiving).remove(candidate)
            self.blocks.release(candidate.sequence.blocks)
            candidate.sequence.blocks = []
        elif candidate.blocks:
            self.running.remove(candidate)
            stop(candidate, self.blocks)
        else:
            self.waiting.remove(candidate)

    def next_batch(self) -> Plan:
        """Decode rows first, then prefill chunks of running prompts, then the queue."""
        plan = Plan()
        self._decode(plan)
        # At least one: a full house of decode rows must not starve the prompts.
        budget = max(1, self.limits.max_num_batched_tokens - len(plan.chunks))
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                budget -= self._take_chunk(sequence, budget, plan)
        self._admit(budget, plan)
        return plan

    def run(self, sequence: Sequence) -> None:
        """`sequence` has its blocks (its KV arrived): it runs from the next step on."""
        insort(self.running, sequence, key=order)

    def fork(self, parent: Sequence, choices: list[int]) -> list[Fork]:
        """Split a computed prompt into one sequence per choice; the prompt's blocks are shared.

        Takes over the blocks of `parent`, which must not be used any more. A choice for which
        there is no block or no seat now joins the queue like a preempted one.
        """
        if parent in self.running:
            self.running.remove(parent)
        full, tail = divmod(parent.num_computed, self.limits.block_size)
        forks: list[Fork] = []
        for i, choice in enumerate(choices):
            child = replace(
                parent,
                choices=(choice,),
                tokens=list(parent.tokens),
                hashes=list(parent.hashes),
                blocks=list(parent.blocks),
            )
            source = target = parent.blocks[-1]
            seated = len(self.running) < self.limits.max_num_seqs
            if i > 0 and seated:
                fresh = self.blocks.allocate(1 if tail else 0)
                seated = fresh is not None
                if fresh is not None:
                    self.blocks.share(parent.blocks[:full])
                    child.blocks = parent.blocks[:full] + fresh
                    target = child.blocks[-1]
            if seated:
                insort(self.running, child, key=order)
            else:
                child.blocks, child.num_computed = [], 0
                if i == 0:
                    self.blocks.release(parent.blocks)
                self.add(child)
            forks.append(Fork(child, source, target))
        parent.blocks = []
        return forks

    # -------------------------------------------------------- decisions

    def _decode(self, plan: Plan) -> None:
        """One row for each running sequence that has one token to compute, oldest first."""
        for sequence in list(self.running):
            if sequence.num_pending != 1 or not sequence.blocks:
                continue
            if self._grow(sequence, plan):
                plan.chunks.append(Chunk(sequence, 1))

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Give `sequence` the block for its next token; preempts the newest if there is none."""
        if self.limits.blocks_for(sequence.num_tokens) == len(sequence.blocks):
            return True
        while (fresh := self.blocks.allocate(1)) is None:
            newest = self.running[-1]
            if newest is sequence and len(self.running) == 1:
                # Alone, and it fits the pool: the missing blocks are granted to handovers or lent
                # to fetches. They come back, or become a newer sequence that can be preempted.
                assert self.receiving or self.num_lent, self.blocks.ledger()
                return False
            self._preempt(newest, plan)
            if newest is sequence:
                return False
        sequence.blocks += fresh
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        self.running.remove(sequence)
        stop(sequence, self.blocks)
        self.add(sequence)
        plan.preempted.append(sequence)

    def _admit(self, budget: int, plan: Plan) -> None:
        """Serve the queue in order, until somebody lacks blocks or a seat."""
        for candidate in list(self.waiting):
            if isinstance(candidate, Sequence) and budget <= 0:
                if candidate is self._short:
                    break
                continue  # wants no blocks yet
            seats = self.num_seats
            if seats and seats + len(candidate.choices) > self.limits.max_num_seqs:
                break
            # Everyone who runs, or will, needs a next block before long.
            headroom = seats
            if isinstance(candidate, Handover):
                if not self._grant(candidate, headroom):
                    self._short = candidate
                    break
                plan.granted.append(candidate)
            else:
                if not start(candidate, self.blocks, self.limits, headroom):
                    self._short = candidate
                    break
                self.waiting.remove(candidate)
                self.run(candidate)
                plan.started.append(candidate)
                budget -= self._take_chunk(candidate, budget, plan)

    def _grant(self, handover: Handover, headroom: int) -> bool:
        """Pin what is cached here and reserve the rest of the prompt: all of it or nothing."""
        sequence = handover.sequence
        pinned = self.blocks.match(sequence.hashes)
        missing = self.limits.blocks_for(sequence.num_tokens) - len(pinned)
        reserved = None
        if self.blocks.num_available >= missing + headroom:
            reserved = self.blocks.reserve(missing)
        if reserved is None:
            self.blocks.release(pinned)
            return False
        self.waiting.remove(handover)
        self.receiving.append(handover)
        sequence.blocks = pinned
        handover.slots = tuple(
            Slot(len(pinned) + i, block, generation)
            for i, (block, generation) in enumerate(reserved)
        )
        return True

    def _take_chunk(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        count = chunk_size(sequence, budget, self.limits.block_size)
        plan.chunks.append(Chunk(sequence, count))
        return count
