"""Which prompts a prefill worker computes next: shortest remaining first, in shared chunks.

A short prompt does not wait for all of a long one: every step serves whoever has least left. Who
waits ages by the tokens that are computed meanwhile, so a prompt waits for at most as many tokens
of later ones as it has itself. Priorities decide who starts: a started prompt, which holds blocks
here and slots at its decode worker, counts as one of the first priority. A prompt gets all its
blocks when its first chunk is scheduled, so a started prompt never waits for memory. Used by
`prefill.engine`, in the engine thread; owns the queue, not the transfers.
"""

from collections import Counter
from dataclasses import dataclass

from common.kv.blocks import BlockManager
from common.messages import Peer
from common.schedule import Chunk, Limits, chunk_size, start, stop
from common.sequence import Sequence


@dataclass(slots=True, eq=False)
class Prompt:
    """One attempt: waiting (no blocks), running (in chunks), then shipping (blocks leased)."""

    sequence: Sequence
    decode: Peer | None
    """The worker that continues; None if the first token is the last."""
    started: bool = False
    shipping: bool = False
    ticketed: bool = False
    """The decode worker reserved its slots: its pull will come."""
    fetching: bool = False
    """Waits for a prefix from another worker's cache."""
    num_offered: int = 0
    """Blocks, from the first on, that were offered to the decode worker."""
    arrival: int = 0
    """Tokens that the worker had computed when the prompt came."""

    def turn(self, first_priority: int) -> tuple[int, int]:
        """Sorts prompts into the order in which they are served: priority, then the tokens left
        less those that it has waited for (all ages grow alike: only differences count).

        `first_priority`: of all prompts here; those that started share it."""
        priority = first_priority if self.started else self.sequence.priority
        return priority, self.sequence.num_pending + self.arrival

    @property
    def is_held(self) -> bool:
        """Its blocks wait for a decode worker that has not promised to take them."""
        return self.started and self.decode is not None and not self.ticketed


class PrefillScheduler:
    """The waiting, running and shipping prompts of one worker."""

    def __init__(self, blocks: BlockManager, limits: Limits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.waiting: list[Prompt] = []
        """In order of arrival, as are the others."""
        self.running: list[Prompt] = []
        self.shipping: list[Prompt] = []
        self._num_computed = 0
        self._short: Prompt | None = None
        """Found too few blocks when it was last its turn to start."""

    @property
    def is_short(self) -> bool:
        """Who is to start next waits for blocks."""
        return self._short in self.waiting

    @property
    def num_held(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.shipping)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens still to be computed."""
        prompts = (*self.waiting, *self.running)
        return sum(prompt.sequence.num_pending for prompt in prompts)

    def add(self, prompt: Prompt) -> None:
        prompt.arrival = self._num_computed
        self.waiting.append(prompt)

    def next_batch(self) -> tuple[list[Chunk], list[Prompt]]:
        """The chunks of the next step in the order of turns, and the prompts that start with it."""
        budget = self.limits.max_num_batched_tokens
        chunks: list[Chunk] = []
        started: list[Prompt] = []
        may_start = True
        prompts = (*self.running, *self.waiting)
        first = min((prompt.sequence.priority for prompt in prompts), default=0)
        # Of equal turns the older one: sorting keeps order, and who runs came before who waits.
        for prompt in sorted(prompts, key=lambda prompt: prompt.turn(first)):
            if budget <= 0:
                break
            if not prompt.started:
                if not may_start or prompt.fetching or self._is_held_back(prompt):
                    continue
                may_start = len(self.running) < self.limits.max_num_seqs
                # Nobody overtakes for blocks: a large prompt would never find enough.
                if may_start and not start(prompt.sequence, self.blocks, self.limits):
                    may_start, self._short = False, prompt
                if not may_start:
                    continue
                self.waiting.remove(prompt)
                self.running.append(prompt)
                prompt.started = True
                started.append(prompt)
            budget -= self._take_chunk(prompt, budget, chunks)
        self._num_computed += self.limits.max_num_batched_tokens - budget
        return chunks, started

    def ship(self, prompt: Prompt) -> None:
        """The prompt is computed: from now on a lease holds its blocks for the decode worker."""
        self.running.remove(prompt)
        self.shipping.append(prompt)
        prompt.shipping = True
        self.blocks.lease(prompt.sequence.blocks)
        self.blocks.release(prompt.sequence.blocks)

    def remove(self, prompt: Prompt) -> None:
        """The prompt ended: free its blocks, which stay cached as far as they are sealed."""
        if prompt.shipping:
            self.shipping.remove(prompt)
            self.blocks.unlease(prompt.sequence.blocks)
        elif prompt.started:
            self.running.remove(prompt)
            stop(prompt.sequence, self.blocks)
        else:
            self.waiting.remove(prompt)

    def _take_chunk(self, prompt: Prompt, budget: int, chunks: list[Chunk]) -> int:
        count = chunk_size(prompt.sequence, budget, self.limits.block_size)
        chunks.append(Chunk(prompt.sequence, count))
        return count

    def _is_held_back(self, prompt: Prompt) -> bool:
        """Whether decode workers that take nothing would hold more than half the pool.

        Only prompts for a worker that already lets blocks wait are held back, so one slow worker
        stops neither the others nor a single prompt that is larger than half the pool.
        """
        if prompt.decode is None:
            return False
        held: Counter[str] = Counter()
        for other in (*self.running, *self.shipping):
            if other.decode is not None and other.is_held:
                held[other.decode.id] += len(other.sequence.blocks)
        needed = self.limits.blocks_for(prompt.sequence.num_tokens)
        over = held.total() + needed > self.limits.num_blocks // 2
        return over and prompt.decode.id in held
