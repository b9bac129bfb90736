"""What the engines of both roles share: attempts, tombstones, draining, what goes out.

An engine takes events (router messages, transfer events, signals) and leaves what it has to say
in `outbox`; it knows no socket and no clock, so that tests drive it by hand. `common.loop` calls
it; `prefill.engine` and `decode.engine` are the two roles.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from common.errors import ProtocolError
from common.events import (
    Announce,
    AttemptId,
    Crashed,
    Drain,
    Draining,
    Fenced,
    FromRouter,
    Outgoing,
    Publish,
    Reset,
    RouterGone,
    Send,
    Status,
)
from common.kv.blocks import BlockManager
from common.messages import (
    Admit,
    Cancel,
    Failed,
    Inspect,
    Inspected,
    Load,
    Output,
    Prefill,
    Step,
)
from common.metrics import WorkerMetrics
from common.model.batch import Row, Sampled
from common.schedule import Chunk, Limits, to_sequence
from common.sequence import Sequence as TokenSequence

TOMBSTONE_S = 60.0
"""How long an ended attempt is remembered, so that a late message cannot revive it."""

log = logging.getLogger("tandem.engine")


class Launched(Protocol):
    """A step under way on a device."""

    def collect(self) -> list[tuple[Sampled, ...]]:
        """Wait for it; gives what `Runner.step` gives."""
        ...


class Runner(Protocol):
    """The model (`common.model.runner.ModelRunner`)."""

    @property
    def overlaps(self) -> bool:
        """Whether a step is computed elsewhere, so that its caller may do something else
        meanwhile."""
        ...

    def launch(self, rows: Sequence[Row]) -> Launched:
        """Begin a step; it must be collected before the next one is begun."""
        ...

    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]: ...

    def copy_block(self, source: int, target: int) -> None: ...


class Engine(ABC):
    """State of one worker's requests. All methods are called by one thread.

    A role's engine adds how an attempt is accepted and dropped, what transfer events mean, what
    is computed next and what becomes of the sampled tokens.
    """

    def __init__(
        self, runner: Runner, blocks: BlockManager, limits: Limits, metrics: WorkerMetrics
    ) -> None:
        self.runner = runner
        self.blocks = blocks
        self.limits = limits
        self.metrics = metrics
        self.outbox: list[Outgoing] = []
        self.steps = 0
        self.now = 0.0
        """Monotonic seconds at the last `take` or `expire`, or at the end of the last step."""
        self.drain_until: float | None = None
        self._outputs: dict[bytes, list[Output]] = {}
        self._tombstones: dict[AttemptId, float] = {}

    # -------------------------------------------------------- the role's part

    @abstractmethod
    def tokens_needed(self, sequence: TokenSequence) -> int:
        """Tokens of this attempt whose KV this worker holds at most."""

    @abstractmethod
    def accept(self, sequence: TokenSequence, work: Prefill | Admit) -> None:
        """Take a valid new attempt over, or `refuse` it."""

    @abstractmethod
    def attempts(self) -> Iterable[tuple[AttemptId, bytes]]:
        """Every live attempt (accepted and not ended) and its router."""

    @abstractmethod
    def is_live(self, attempt: AttemptId) -> bool: ...

    @abstractmethod
    def drop(self, attempt: AttemptId, reason: str) -> None:
        """Forget a live attempt, ending its transfer; its blocks are freed now or when the I/O
        thread has let them go."""

    @abstractmethod
    def drop_choices(self, attempt: AttemptId, choices: Collection[int]) -> None:
        """The router wants no more of some choices of a live attempt."""

    @abstractmethod
    def transfer(self, event: object) -> None:
        """Handle an event of the KV transfer endpoint."""

    @abstractmethod
    def idle(self) -> bool:
        """Nothing is live and no block is lent to the I/O thread."""

    @abstractmethod
    def load(self) -> Load: ...

    @abstractmethod
    def num_held(self) -> int:
        """Sequences that are running, waiting or being transferred."""

    @abstractmethod
    def next_batch(self) -> list[Chunk]:
        """What the next step computes; empty if there is nothing to compute now."""

    @abstractmethod
    def settle(self, batch: list[Chunk], results: list[tuple[Sampled, ...]]) -> None:
        """Take over the results of a step."""

    # -------------------------------------------------------- the shared part

    @property
    def done(self) -> bool:
        """The worker may exit: it drains, and holds nothing or its time is up."""
        return self.drain_until is not None and (self.idle() or self.now >= self.drain_until)

    def deadline(self) -> float | None:
        """When `expire` has something to do even if no event comes before."""
        return self.drain_until

    def take(self, event: object, now: float) -> None:
        """Handle one event of the inbox. `now`: monotonic seconds."""
        self.now = now
        match event:
            case FromRouter(router, Prefill() | Admit() as work):
                self._take_work(router, work)
            case FromRouter(_, Cancel(request, attempt, ()), at):
                if self.is_live((request, attempt)):
                    self.metrics.cancel_to_free.observe(max(0.0, now - at))
                self.end((request, attempt), "cancelled")
            case FromRouter(_, Cancel(request, attempt, choices)):
                if self.is_live((request, attempt)):
                    self.drop_choices((request, attempt), choices)
            case FromRouter(router, Inspect(seq)):
                ledger = self.blocks.ledger(self.num_held())
                self.outbox.append(Send(router, Inspected(seq, ledger)))
            case RouterGone(router):
                for id in [id for id, owner in self.attempts() if owner == router]:
                    self.end(id, "router_gone")
            case Drain(within_s):
                if self.drain_until is None:
                    self.drain_until = now + within_s
                    self.outbox.append(Draining())
            case Reset():
                self.metrics.resets.inc()
                self._fail_all("reset")
                self.outbox.append(Announce(self.blocks.cached_hashes()))
            case Crashed(error):
                raise error
            case _:
                self.transfer(event)

    def expire(self, now: float) -> None:
        """Handle what is due at `now`."""
        self.now = now
        while self._tombstones:
            attempt = next(iter(self._tombstones))  # the oldest
            if self._tombstones[attempt] > now:
                break
            del self._tombstones[attempt]
        if self.drain_until is not None and now >= self.drain_until:
            self._fail_all("draining")

    def step(self, batch: list[Chunk]) -> list[tuple[Sampled, ...]]:
        """Compute a batch with the model."""
        results = self.runner.step([chunk.sequence.row(chunk.count) for chunk in batch])
        self.steps += 1
        self.metrics.steps.inc()
        return results

    def launch(self, batch: list[Chunk]) -> Launched:
        """Begin to compute a batch. Until it was collected only events that are `harmless` may be
        taken: the step reads and writes the blocks of its sequences."""
        return self.runner.launch([chunk.sequence.row(chunk.count) for chunk in batch])

    def collect(self, launched: Launched) -> list[tuple[Sampled, ...]]:
        results = launched.collect()
        self.steps += 1
        self.metrics.steps.inc()
        return results

    def harmless(self, event: object) -> bool:
        """Whether an event ends no attempt that may be part of the step under way."""
        match event:
            case FromRouter(_, Prefill() | Admit() | Inspect()) | Fenced():
                return True
        return False

    def flush(self) -> list[Outgoing]:
        """Everything to be said since the last call; the outputs of one router in one Step."""
        stored, evicted = self.blocks.take_events()
        if stored or evicted:
            self.outbox.append(Publish(stored, evicted))
        if self._outputs:
            load = self.load()
            # Tokens first: a Failed of the same attempt may follow.
            self.outbox[:0] = [Send(r, Step(tuple(o), load)) for r, o in self._outputs.items()]
            self._outputs = {}
        items, self.outbox = self.outbox, []
        return items

    def status(self, busy: bool) -> Status:
        state = "ready" if self.drain_until is None else "draining"
        return Status(self.steps, self.load(), busy, state)

    def emit(self, router: bytes, output: Output) -> None:
        """Leave an output for the next Step message to `router`."""
        self._outputs.setdefault(router, []).append(output)

    def end(self, attempt: AttemptId, outcome: str) -> None:
        """The attempt is over, here or before it came; its router is told nothing."""
        if self.is_live(attempt):
            self.drop(attempt, outcome)
            self.metrics.requests.labels(outcome).inc()
        self._bury(attempt)

    def close(self, attempt: AttemptId, outcome: str) -> None:
        """An attempt that holds nothing any more did what was asked of it."""
        self.metrics.requests.labels(outcome).inc()
        self._bury(attempt)

    def refuse(self, router: bytes, attempt: AttemptId, reason: str, detail: str = "") -> None:
        """Give up an attempt that holds nothing (any more) and tell its router."""
        log.info("request %d attempt %d failed: %s %s", *attempt, reason, detail)
        self.metrics.requests.labels(reason).inc()
        self.outbox.append(Send(router, Failed(*attempt, reason, detail)))
        self._bury(attempt)

    def is_buried(self, attempt: AttemptId) -> bool:
        """Whether this attempt ended within the last `TOMBSTONE_S`."""
        return attempt in self._tombstones

    def _bury(self, attempt: AttemptId) -> None:
        self._tombstones.pop(attempt, None)  # keeps the dict ordered by time
        self._tombstones[attempt] = self.now + TOMBSTONE_S

    def _take_work(self, router: bytes, work: Prefill | Admit) -> None:
        attempt = (work.request, work.attempt)
        if self.is_live(attempt) or self.is_buried(attempt):
            self.metrics.dropped.labels("work").inc()
            return
        if self.drain_until is not None:
            self.refuse(router, attempt, "draining")
            return
        try:
            sequence = to_sequence(work, router, self.limits)
        except ProtocolError as error:
            self.refuse(router, attempt, "invalid", str(error))
            return
        needed = self.limits.blocks_for(self.tokens_needed(sequence))
        if needed > self.limits.num_blocks:
            detail = f"{needed} blocks needed, the pool has {self.limits.num_blocks}"
            self.refuse(router, attempt, "no_blocks", detail)
            return
        sequence.taken = self.now
        self.accept(sequence, work)

    def _fail_all(self, reason: str) -> None:
        for attempt, router in list(self.attempts()):
            self.drop(attempt, reason)
            self.refuse(router, attempt, reason)
