"""What a prefill worker does with each event: from Prefill to blocks that a decode worker has.

waiting -> running (Open, Offer per chunk) -> first tokens to the router -> shipping (Close; blocks
leased) -> Delivered. The transfer of an attempt that ends early is aborted; its blocks stay leased
until the I/O thread has let them go (`Fence`), because it may be reading them. Driven by
`common.loop` in the engine thread.
"""

from collections.abc import Collection, Iterable

from common.engine import Runner
from common.events import AttemptId, Fence, Fenced, Ship
from common.kv.blocks import BlockManager
from common.messages import Admit, Load, Prefill
from common.metrics import WorkerMetrics
from common.model.batch import Sampled
from common.schedule import Chunk, Limits, advance, to_output
from common.sequence import Sequence
from kvtransfer.commands import (
    Abort,
    BlockRef,
    Broken,
    Close,
    Delivered,
    First,
    Key,
    Offer,
    Open,
    Refuse,
    Ticketed,
    Wanted,
)
from kvtransfer.fetching import FetchingEngine
from prefill.scheduler import PrefillScheduler, Prompt

PEER_REASONS = ("peer", "gone", "no_blocks", "draining", "refused")
"""Why a transfer broke, where that is the decode worker's doing and not the network's."""


class PrefillEngine(FetchingEngine):
    """The attempts of one prefill worker."""

    def __init__(
        self, runner: Runner, blocks: BlockManager, limits: Limits, metrics: WorkerMetrics
    ) -> None:
        super().__init__(runner, blocks, limits, metrics)
        self.scheduler = PrefillScheduler(blocks, limits)
        self._prompts: dict[AttemptId, Prompt] = {}
        self._fenced: dict[AttemptId, list[int]] = {}
        """Leased blocks of aborted transfers that the I/O thread may still read."""

    # -------------------------------------------------------- attempts

    def tokens_needed(self, sequence: Sequence) -> int:
        return sequence.num_tokens

    def accept(self, sequence: Sequence, work: Prefill | Admit) -> None:
        attempt = (sequence.request, sequence.attempt)
        if not isinstance(work, Prefill):
            self.refuse(sequence.router, attempt, "invalid", "this is a prefill worker")
            return
        prompt = Prompt(sequence, work.decode)
        self._prompts[attempt] = prompt
        self.scheduler.add(prompt)
        if work.fetch is not None:
            prompt.fetching = self.fetch(sequence, work.fetch)

    def fetched(self, attempt: AttemptId) -> None:
        self._prompts[attempt].fetching = False

    def sends(self, attempt: AttemptId) -> bool:
        return attempt in self._prompts or attempt in self._fenced

    @property
    def is_short(self) -> bool:
        return self.scheduler.is_short

    def attempts(self) -> Iterable[tuple[AttemptId, bytes]]:
        return [(a, prompt.sequence.router) for a, prompt in self._prompts.items()]

    def is_live(self, attempt: AttemptId) -> bool:
        return attempt in self._prompts

    def drop(self, attempt: AttemptId, reason: str) -> None:
        prompt = self._prompts.pop(attempt)
        self.end_fetch(attempt)
        if prompt.started and prompt.decode is not None:
            self.outbox.append(Ship(Abort(Key(*attempt), reason)))
            self.outbox.append(Fence(attempt))
            self._fenced[attempt] = list(prompt.sequence.blocks)
            self.blocks.lease(prompt.sequence.blocks)
        self.scheduler.remove(prompt)

    def drop_choices(self, attempt: AttemptId, choices: Collection[int]) -> None:
        """One row computes the prompt for all choices: only the end of all of them saves work."""
        if set(self._prompts[attempt].sequence.choices) <= set(choices):
            self.end(attempt, "cancelled")

    def idle(self) -> bool:
        return not self._prompts and not self._fenced and not self.is_exchanging

    def num_held(self) -> int:
        return self.scheduler.num_held

    def load(self) -> Load:
        running = self.scheduler.running
        return Load(
            running=len(running),
            waiting=len(self.scheduler.waiting),
            prefill_tokens=self.scheduler.prefill_tokens,
            kv_tokens=sum(prompt.sequence.num_computed for prompt in running),
            free_blocks=self.blocks.num_available,
            fetch_bps=self.fetch_bps,
        )

    def transfer(self, event: object) -> None:
        if self.take_exchange(event):
            return
        match event:
            case Ticketed(key):
                if prompt := self._prompts.get(key):
                    prompt.ticketed = True
            case Delivered(key):
                if prompt := self._prompts.pop(key, None):
                    assert prompt.shipping, key
                    self.scheduler.remove(prompt)
                    self.close(key, "handed_over")
            case Broken(key, reason, detail):
                if prompt := self._prompts.pop(key, None):
                    # The endpoint let the blocks go before it said so: no fence.
                    self.scheduler.remove(prompt)
                    failure = "peer" if reason in PEER_REASONS else "transfer"
                    self.refuse(prompt.sequence.router, key, failure, f"{reason}: {detail}")
            case Fenced(attempt):
                self.blocks.unlease(self._fenced.pop(attempt))
            case Wanted(key):
                # Of a fetch that is over, or of nobody's.
                self.outbox.append(Ship(Refuse(key, "gone")))
                self.metrics.dropped.labels("transfer").inc()
            case _:
                # Arrived, Returned: what was refused may come back as well.
                self.metrics.dropped.labels("transfer").inc()

    # -------------------------------------------------------- steps

    def next_batch(self) -> list[Chunk]:
        chunks, started = self.scheduler.next_batch()
        for prompt in started:
            sequence = prompt.sequence
            sequence.began = self.now
            self.metrics.cached_tokens.inc(min(sequence.num_cached, sequence.prompt_len))
            if prompt.decode is not None:
                key = Key(sequence.request, sequence.attempt)
                self.outbox.append(Ship(Open(key, prompt.decode, sequence.num_tokens)))
                self._offer_full_blocks(prompt)
        return chunks

    def settle(self, batch: list[Chunk], results: list[tuple[Sampled, ...]]) -> None:
        for chunk, sampled in zip(batch, results, strict=True):
            sequence = chunk.sequence
            prompt = self._prompts[sequence.request, sequence.attempt]
            self.metrics.computed_tokens.inc(chunk.num_prompt_tokens)
            advance(sequence, chunk.count, self.blocks, self.limits.block_size)
            if prompt.decode is not None:
                self._offer_full_blocks(prompt)
            if sequence.num_pending == 0:
                self._hand_over(prompt, sampled)

    def _offer_full_blocks(self, prompt: Prompt) -> None:
        sequence, size = prompt.sequence, self.limits.block_size
        full = sequence.num_computed // size
        refs = tuple(BlockRef(i, sequence.blocks[i], size) for i in range(prompt.num_offered, full))
        if refs:
            key = Key(sequence.request, sequence.attempt)
            self.outbox.append(Ship(Offer(key, refs)))
            prompt.num_offered = full

    def _hand_over(self, prompt: Prompt, sampled: tuple[Sampled, ...]) -> None:
        """The prompt is computed: first tokens to the router, the rest to the decode worker."""
        sequence = prompt.sequence
        key = Key(sequence.request, sequence.attempt)
        first = self._emit_first(sequence, sampled)
        if prompt.decode is None or not first:
            self.end(key, "finished")
            return
        if fill := sequence.num_tokens % self.limits.block_size:
            tail = BlockRef(prompt.num_offered, sequence.blocks[prompt.num_offered], fill)
            self.outbox.append(Ship(Offer(key, (tail,))))
        self.outbox.append(Ship(Close(key, first)))
        self.scheduler.ship(prompt)

    def _emit_first(self, sequence: Sequence, sampled: tuple[Sampled, ...]) -> tuple[First, ...]:
        """Send the first token of each choice; returns those of the choices that go on."""
        first: list[First] = []
        cached = min(sequence.num_cached, sequence.prompt_len)
        for choice, draw in zip(sequence.choices, sampled, strict=True):
            output = to_output(sequence, choice, draw, self.limits, cached, self.now)
            self.emit(sequence.router, output)
            if not output.finish:
                first.append(First(choice, draw.token, draw.logprob, cached))
        self.metrics.generated_tokens.inc(len(sampled))
        return tuple(first)
