"""What a decode worker does with each event: from Admit to the last token.

Handover: Admit and Wanted (in either order) -> queue -> Grant -> Arrived -> running. Without a
prefill worker, and after a preemption: queue -> chunks -> running. A grant is lent to the I/O
thread from Grant until Arrived or Returned, whatever becomes of its attempt; only then are its
slots used again. Driven by `common.loop` in the engine thread.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from common.engine import Runner
from common.events import AttemptId, Ship
from common.kv.blocks import BlockManager
from common.messages import Admit, Load, Prefill
from common.metrics import WorkerMetrics
from common.model.batch import Sampled
from common.schedule import Chunk, Limits, advance, to_output
from common.sequence import Sequence
from decode.handover import Claims, Handover
from decode.scheduler import DecodeScheduler
from kvtransfer.commands import Arrived, First, Grant, Refuse, Returned, Revoke, Wait, Wanted
from kvtransfer.fetching import FetchingEngine


@dataclass(slots=True)
class Attempt:
    """One placement of one request on this worker."""

    router: bytes
    handover: Handover | None
    """Until its KV arrived; None if it is prefilled here."""
    sequences: list[Sequence] = field(default_factory=list)
    """Its unfinished choices, running or waiting (not while it is a handover)."""
    prefilled: bool = False
    """The first output was sent, or is sent by the prefill worker."""
    unwanted: set[int] = field(default_factory=set)
    """Choices that the router ended while the KV was on its way."""


class DecodeEngine(FetchingEngine):
    """The attempts of one decode worker."""

    def __init__(
        self, runner: Runner, blocks: BlockManager, limits: Limits, metrics: WorkerMetrics
    ) -> None:
        super().__init__(runner, blocks, limits, metrics)
        self.scheduler = DecodeScheduler(blocks, limits)
        self._attempts: dict[AttemptId, Attempt] = {}
        self._lent: dict[AttemptId, Handover] = {}
        """Grants of dropped attempts that were not given back yet."""
        self._claims = Claims()
        self._num_taken = 0

    # -------------------------------------------------------- attempts

    def tokens_needed(self, sequence: Sequence) -> int:
        return self.limits.most_tokens(sequence)

    def accept(self, sequence: Sequence, work: Prefill | Admit) -> None:
        id = (sequence.request, sequence.attempt)
        if not isinstance(work, Admit):
            self.refuse(sequence.router, id, "invalid", "this is a decode worker")
            return
        self._num_taken += 1
        sequence.arrival = self._num_taken
        if work.prefill is None:
            self._attempts[id] = Attempt(sequence.router, None, [sequence])
            if work.fetch is None or not self.fetch(sequence, work.fetch):
                self.scheduler.add(sequence)
            return
        handover = Handover(sequence, work.prefill)
        self._attempts[id] = Attempt(sequence.router, handover, prefilled=True)
        match self._claims.pop(id):
            case Wanted() as wanted:
                self._want(handover, wanted)
            case Returned(_, landed, reason):
                self._give_up(handover, landed, reason)

    def fetched(self, attempt: AttemptId) -> None:
        self.scheduler.add(self._attempts[attempt].sequences[0])

    def sends(self, attempt: AttemptId) -> bool:
        return False

    @property
    def is_short(self) -> bool:
        return self.scheduler.is_short

    def headroom(self) -> int:
        return self.scheduler.num_seats

    def lend(self, change: int) -> None:
        self.scheduler.num_lent += change

    def attempts(self) -> Iterable[tuple[AttemptId, bytes]]:
        return [(id, attempt.router) for id, attempt in self._attempts.items()]

    def is_live(self, attempt: AttemptId) -> bool:
        return attempt in self._attempts

    def drop(self, attempt: AttemptId, reason: str) -> None:
        dropped = self._attempts.pop(attempt)
        if self.is_fetching(attempt):
            self.end_fetch(attempt)
            return
        for sequence in dropped.sequences:
            self.scheduler.remove(sequence)
        handover = dropped.handover
        if handover is None or not handover.wanted:
            return
        self.scheduler.remove(handover)
        if handover.slots is None:
            self.outbox.append(Ship(Refuse(handover.key, "gone")))
        else:
            self.outbox.append(Ship(Revoke(handover.key)))
            self._lent[attempt] = handover
            self.scheduler.num_lent += 1

    def drop_choices(self, attempt: AttemptId, choices: Collection[int]) -> None:
        """End the sequences of `choices`; the attempt goes on with the others, if there are any."""
        live = self._attempts[attempt]
        if live.handover is not None:
            live.unwanted.update(choices)
            if live.unwanted.issuperset(live.handover.choices):
                self.end(attempt, "cancelled")
            return
        is_fetching = self.is_fetching(attempt)
        for sequence in list(live.sequences):
            left = tuple(choice for choice in sequence.choices if choice not in choices)
            if left:
                sequence.choices = left
            elif is_fetching:
                self.end(attempt, "cancelled")
                return
            else:
                self.scheduler.remove(sequence)
                live.sequences.remove(sequence)
        if not live.sequences:
            self.end(attempt, "cancelled")

    def idle(self) -> bool:
        return not self._attempts and not self._lent and not self.is_exchanging

    def deadline(self) -> float | None:
        times = (super().deadline(), self._claims.deadline())
        return min((t for t in times if t is not None), default=None)

    def expire(self, now: float) -> None:
        super().expire(now)
        for key in self._claims.expire(now):
            self.outbox.append(Ship(Refuse(key, "gone")))

    def num_held(self) -> int:
        return sum(max(1, len(a.sequences)) for a in self._attempts.values())

    def load(self) -> Load:
        running = self.scheduler.running
        local = [s for s in self.scheduler.waiting if isinstance(s, Sequence)]
        return Load(
            running=len(running),
            waiting=self.num_held() - len(running),
            prefill_tokens=sum(s.num_pending for s in (*running, *local) if s.num_pending > 1),
            kv_tokens=sum(s.num_computed for s in running),
            free_blocks=self.blocks.num_available,
            fetch_bps=self.fetch_bps,
        )

    # -------------------------------------------------------- handovers

    def transfer(self, event: object) -> None:
        if self.take_exchange(event):
            return
        match event:
            case Wanted(key):
                self._take_wanted(event)
            case Arrived(key, first):
                if key in self._lent:
                    self._take_back(key, self._lent[key].positions)
                elif (attempt := self._attempts.get(key)) and attempt.handover:
                    self._arrive(attempt, attempt.handover, first)
            case Returned(key, landed, reason):
                if key in self._lent:
                    self._take_back(key, landed)
                elif (attempt := self._attempts.get(key)) and attempt.handover:
                    self._give_up(attempt.handover, landed, reason)
                else:
                    self._claims.end(event)
            case _:
                # Ticketed, Delivered, Broken, Fenced: a decode worker sends nothing else.
                self.metrics.dropped.labels("transfer").inc()

    def _take_wanted(self, wanted: Wanted) -> None:
        key = wanted.key
        attempt = self._attempts.get(key)
        if attempt is not None and attempt.handover is not None:
            self._want(attempt.handover, wanted)
        elif attempt is not None or self.is_buried(key):
            self.outbox.append(Ship(Refuse(key, "gone")))
        elif self.drain_until is not None:
            self.outbox.append(Ship(Refuse(key, "draining")))
        else:
            self._claims.add(wanted, self.now)

    def _want(self, handover: Handover, wanted: Wanted) -> None:
        """The prefill worker asks for slots, once or again; answered in `next_batch`."""
        if not handover.is_asked_by(wanted):
            self.outbox.append(Ship(Refuse(wanted.key, "gone")))
            self._give_up(handover, (), f"not the prompt of {wanted.source.id}")
            return
        handover.told = False
        if not handover.wanted:
            handover.wanted = True
            handover.sequence.taken = self.now
            self.scheduler.add(handover)

    def _arrive(self, attempt: Attempt, handover: Handover, first: tuple[First, ...]) -> None:
        """The KV of the prompt is here: go on after the first tokens, which are sent again so
        that losing the prefill worker now loses nothing, nor does being faster than its link."""
        parent = handover.sequence
        pinned, parent.blocks = parent.blocks, []  # `remove` is not to release them
        self.scheduler.remove(handover)
        parent.blocks = pinned + handover.land(self.blocks, handover.positions)
        parent.num_computed = parent.num_tokens
        attempt.handover = None
        draws = {f.choice: Sampled(f.token, f.logprob) for f in first}
        cached = first[0].cached_tokens if first else -1
        if not draws or not draws.keys() <= set(parent.choices):
            self.blocks.release(parent.blocks)
            del self._attempts[handover.key]
            detail = f"first tokens of choices {list(draws)}, not of {parent.choices}"
            self.refuse(attempt.router, handover.key, "transfer", detail)
            return
        wanted = [choice for choice in draws if choice not in attempt.unwanted]
        if not wanted:
            self.blocks.release(parent.blocks)
            self.end(handover.key, "cancelled")
            return
        attempt.sequences = self._split(parent, wanted)
        for sequence in list(attempt.sequences):
            self._append(attempt, sequence, draws[sequence.choices[0]], cached)

    def _give_up(self, handover: Handover, landed: tuple[int, ...], reason: str) -> None:
        """The grant came back unfinished, or the sender gave up before there was one."""
        key, router = handover.key, handover.sequence.router
        del self._attempts[key]
        if handover.wanted:
            self.scheduler.remove(handover)
        if handover.slots is not None:
            self.blocks.release(handover.land(self.blocks, landed))
        if reason == "finished":
            self.close(key, "finished")
        else:
            self.refuse(router, key, "peer" if reason == "peer" else "transfer", reason)

    def _take_back(self, attempt: AttemptId, landed: tuple[int, ...]) -> None:
        """The grant of an attempt that was dropped: its slots may be used again."""
        handover = self._lent.pop(attempt)
        self.scheduler.num_lent -= 1
        self.blocks.release(handover.land(self.blocks, landed))

    # -------------------------------------------------------- steps

    def next_batch(self) -> list[Chunk]:
        plan = self.scheduler.next_batch()
        for handover in plan.granted:
            assert handover.slots is not None
            handover.sequence.began = self.now
            self.outbox.append(Ship(Grant(handover.key, handover.slots)))
            handover.told = True
        for candidate in self.scheduler.waiting:
            if isinstance(candidate, Handover) and not candidate.told:
                self.outbox.append(Ship(Wait(candidate.key)))
                candidate.told = True
        for sequence in plan.started:
            sequence.began = self.now
            self.metrics.cached_tokens.inc(min(sequence.num_cached, sequence.prompt_len))
        self.metrics.preemptions.inc(len(plan.preempted))
        return plan.chunks

    def settle(self, batch: list[Chunk], results: list[tuple[Sampled, ...]]) -> None:
        for chunk, sampled in zip(batch, results, strict=True):
            sequence = chunk.sequence
            self.metrics.computed_tokens.inc(chunk.num_prompt_tokens)
            advance(sequence, chunk.count, self.blocks, self.limits.block_size)
            if sequence.num_pending == 0:
                attempt = self._attempts[sequence.request, sequence.attempt]
                self._take_tokens(attempt, sequence, sampled)

    def _take_tokens(
        self, attempt: Attempt, sequence: Sequence, sampled: tuple[Sampled, ...]
    ) -> None:
        """The next token of each choice of `sequence` (several: the prompt was just computed)."""
        cached = -1 if attempt.prefilled else min(sequence.num_cached, sequence.prompt_len)
        attempt.prefilled = True
        self.metrics.generated_tokens.inc(len(sampled))
        draws = dict(zip(sequence.choices, sampled, strict=True))
        if len(draws) > 1:
            attempt.sequences = self._split(sequence, list(draws))
            for child in list(attempt.sequences):
                self._append(attempt, child, draws[child.choices[0]], cached)
        else:
            self._append(attempt, sequence, sampled[0], cached)

    def _split(self, parent: Sequence, choices: list[int]) -> list[Sequence]:
        """One sequence per choice, running or (without room) waiting."""
        forks = self.scheduler.fork(parent, choices)
        for fork in forks:
            if fork.source != fork.target:
                self.runner.copy_block(fork.source, fork.target)
        return [fork.sequence for fork in forks]

    def _append(self, attempt: Attempt, sequence: Sequence, draw: Sampled, cached: int) -> None:
        """Send the next token of one choice; end the choice, or go on after it."""
        output = to_output(sequence, sequence.choices[0], draw, self.limits, cached, self.now)
        self.emit(attempt.router, output)
        if not output.finish:
            sequence.tokens.append(draw.token)
            return
        self.scheduler.remove(sequence)
        attempt.sequences.remove(sequence)
        if not attempt.sequences:
            id = (sequence.request, sequence.attempt)
            del self._attempts[id]
            self.close(id, output.finish)
