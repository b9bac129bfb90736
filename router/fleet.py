"""The live workers as this router sees them: who they are and how loaded.

A worker is a member from the link's Up to its Down. Owned by `router.service`, which reports
what comes in and reserves what goes out; read by `/health`, `/debug/workers` and placement.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from common.messages import Load, Peer, WorkerInfo
from router.cost_meter import CostMeter, Peers
from router.health import Breaker, Outliers
from router.placement import Candidate
from router.progress import Progress
from router.request import Attempt

log = logging.getLogger(__name__)

FETCH_BPS: Final = 1e9
"""Bytes per second of a fetch by a worker that has made none yet."""
FETCH_BASE_S: Final = 0.005
"""From the request for a prefix to its first block: messages, and a turn of the owner's engine."""
FULL: Final = 2
"""Times as many sequences as it can run: a decode worker that has so many gets no more. What comes
then waits at the router, which knows whose turn it is."""


class Carried(msgspec.Struct, frozen=True, array_like=True):
    """What routers have in flight on one worker."""

    prefill_tokens: int = 0
    kv_tokens: int = 0
    num_seqs: int = 0

    def __add__(self, other: "Carried") -> "Carried":
        return Carried(
            self.prefill_tokens + other.prefill_tokens,
            self.kv_tokens + other.kv_tokens,
            self.num_seqs + other.num_seqs,
        )


NOTHING: Final = Carried()


class Gauge:
    """A load that the worker reports late and that this router knows in part at once.

    What was placed since the report before last is not in the report yet; what this router and
    others have in flight is there in any case.
    """

    __slots__ = ("_newer", "_older", "others", "own", "reported")

    def __init__(self) -> None:
        self.own = 0
        self.others = 0
        self.reported = 0
        self._older = 0
        self._newer = 0

    @property
    def value(self) -> int:
        return max(self.own + self.others, self.reported + self._older + self._newer)

    def place(self, amount: int) -> None:
        self.own += amount
        self._newer += amount

    def end(self, amount: int) -> None:
        self.own -= amount
        assert self.own >= 0, self.own

    def report(self, value: int) -> None:
        self.reported = value
        self._older, self._newer = self._newer, 0


class Member:
    """One live worker."""

    def __init__(self, info: WorkerInfo, hang_s: float, meter: CostMeter) -> None:
        self.info = info
        self.meter = meter
        self.progress = Progress(hang_s)
        self.breaker = Breaker()
        self.draining = info.state != "ready"
        self.load = Load(free_blocks=info.num_blocks)
        self.prefill_tokens = Gauge()
        self.kv_tokens = Gauge()
        self.num_seqs = Gauge()
        self._num_routers = 1
        self.streams: set[Attempt] = set()
        """Attempts of this router to which it adds token by token: its steps are told here."""

    @property
    def state(self) -> str:
        """`ready`, `draining` or `hung`; only a ready worker gets new work."""
        if self.draining:
            return "draining"
        return "hung" if self.progress.hung else "ready"

    @property
    def peer(self) -> Peer:
        return Peer(self.info.id, self.info.epoch, self.info.kv_address, self.info.curve_key)

    @property
    def capacity(self) -> int:
        """Tokens that its KV pool holds."""
        return self.info.num_blocks * self.info.layout.block_size

    @property
    def carried(self) -> Carried:
        """What this router has in flight here."""
        return Carried(self.prefill_tokens.own, self.kv_tokens.own, self.num_seqs.own)

    def share(self, others: Carried, num_routers: int) -> None:
        """What other routers have in flight here. `num_routers`: that have any, and this one."""
        self.prefill_tokens.others = others.prefill_tokens
        self.kv_tokens.others = others.kv_tokens
        self.num_seqs.others = others.num_seqs
        self._num_routers = num_routers

    @property
    def full(self) -> bool:
        """What comes now would only wait here.

        Of several routers each may fill its part of the seats, whatever the others hold: one that
        takes each seat again as it ends would keep the others out for ever. Until it has ended what
        is above its part, more than the seats are taken: by two routers less than twice as many.
        """
        seats = FULL * self.info.max_num_seqs
        part = max(1, seats // self._num_routers)
        load = self.num_seqs
        return self.info.role == "decode" and load.value >= seats and load.own >= part

    def report(self, load: Load) -> None:
        self.load = load
        self.prefill_tokens.report(load.prefill_tokens)
        self.kv_tokens.report(load.kv_tokens)
        self.num_seqs.report(load.running + load.waiting)

    def candidate(self, now: float, suspended: bool = False) -> Candidate:
        return Candidate(
            id=self.info.id,
            role=self.info.role,
            content_id=self.info.content_id,
            layout=self.info.layout,
            capacity=self.capacity,
            max_num_seqs=self.info.max_num_seqs,
            prefill_tokens=self.prefill_tokens.value,
            queue=self.meter.queue(now) if self.info.role == "prefill" else (),
            kv_tokens=self.kv_tokens.value,
            num_seqs=self.num_seqs.value,
            ready=self.state == "ready" and not self.full and not suspended,
            serves=self.state == "ready",
            cost=self.meter.model,
            chunk_tokens=self.info.max_num_batched_tokens,
            fetch_s=self.info.layout.token_bytes / (self.load.fetch_bps or FETCH_BPS),
            fetch_base_s=FETCH_BASE_S,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    context: int
    """Prompt and output tokens together, at most."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()


class Fleet:
    def __init__(
        self,
        max_model_len: int = 0,
        hang_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_model_len` above 0 bounds what the workers allow. `hang_s`: see `Progress`."""
        self._members: dict[str, Member] = {}
        self._clock = clock
        self._costs: dict[tuple[str, str], Peers] = {}
        """What computing costs on all workers of a role and content id."""
        self._outliers = {"prefill": Outliers(), "decode": Outliers()}
        self._max_model_len = max_model_len
        self._hang_s = hang_s
        self.limits: Limits | None = None
        """None until a decode worker was there; then the last ones known."""
        self.changed = asyncio.Event()
        """Set when `carried` changed; for whoever shares it."""

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._members

    def __getitem__(self, worker_id: str) -> Member:
        return self._members[worker_id]

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def get(self, worker_id: str | None) -> Member | None:
        return None if worker_id is None else self._members.get(worker_id)

    def up(self, info: WorkerInfo) -> None:
        prefills = self._costs.setdefault(("prefill", info.content_id), Peers())
        peers = self._costs.setdefault((info.role, info.content_id), Peers(prefills))
        meter = CostMeter(peers, decodes=info.role == "decode")
        self._members[info.id] = Member(info, self._hang_s, meter)
        self._update_limits()

    def down(self, worker_id: str) -> None:
        if self._members.pop(worker_id, None) is not None:
            self._update_limits()

    def counts(self) -> dict[str, int]:
        """How many workers of each role get work."""
        roles = [member.info.role for member in self if member.state == "ready"]
        return {role: roles.count(role) for role in ("prefill", "decode")}

    def why_not(self) -> str | None:
        """None if a request can be served, else why not."""
        states = {member.state for member in self if member.info.role == "decode"}
        if not states:
            return "no decode worker is connected"
        if "ready" in states:
            return None
        return "every decode worker hangs" if "hung" in states else "all decode workers are leaving"

    def is_busy(self, num_tokens: int, content_id: str | None, refused: Container[str]) -> bool:
        """There are workers that could take so many tokens of this content (None: any), but they
        have all that they can do. `refused`: workers that do not count."""
        return any(
            member.full
            and member.state == "ready"
            and member.capacity > num_tokens
            and content_id in (None, member.info.content_id)
            and member.info.id not in refused
            for member in self
        )

    @property
    def has_seats(self) -> bool:
        """Some decode worker takes new work."""
        free = [
            member.info.id
            for member in self
            if member.info.role == "decode" and member.state == "ready" and not member.full
        ]
        return bool(free) and not self._suspended().issuperset(free)

    def num_requests(self) -> tuple[int, int]:
        """(running, waiting) sequences on all workers, of all routers, as workers reported them.

        A decode worker counts what its prefill workers are still at as waiting: it is theirs."""
        prefill = [member.load for member in self if member.info.role == "prefill"]
        decode = [member.load for member in self if member.info.role == "decode"]
        queued = sum(load.waiting for load in prefill)
        prefilled = sum(load.running for load in prefill)
        held = sum(load.waiting for load in decode)
        running = prefilled + sum(load.running for load in decode)
        return running, queued + max(0, held - queued - prefilled)

    def snapshot(self) -> list[Candidate]:
        now, suspended = self._clock(), self._suspended()
        return [member.candidate(now, member.info.id in suspended) for member in self]

    def _suspended(self) -> set[str]:
        """Workers that get nothing for a while; of a role not all: rather a bad one than none.

        One that fails is spared while another is there, and be it full: to wait for that is better
        than one more failure. One that is slow is spared only while another has room.
        """
        now = self._clock()
        result: set[str] = set()
        for role, outliers in self._outliers.items():
            ready = [m for m in self if m.info.role == role and m.state == "ready"]
            failing = {m.info.id for m in ready if not m.breaker.allows(now)}
            if len(failing) < len(ready):
                result |= failing
            free = [m for m in ready if not m.full and m.info.id not in result]
            slow = {m.info.id for m in free if outliers.out(m.info.id, now)}
            if len(slow) < len(free):
                result |= slow
        return result

    def failed(self, worker_ids: Iterable[str]) -> None:
        """An attempt ended by a failure of these workers."""
        for worker in worker_ids:
            member = self.get(worker)
            if member is not None and member.breaker.failed(self._clock()):
                log.warning("worker %s fails again and again: it gets a rest", worker)

    def review(self) -> None:
        """Look for workers that are far slower than the others of their role."""
        for role, outliers in self._outliers.items():
            paces = {m.info.id: m.meter.pace for m in self if m.info.role == role}
            for worker in outliers.review(paces, self._clock()):
                meter = self[worker].meter
                slowness = meter.pace.slowness
                log.warning("worker %s is %.1f times as slow as its like", worker, slowness)
                # Nothing new is seen of it now: without this it would be out for ever.
                meter.forget_pace()

    def carried(self) -> dict[str, Carried]:
        """What this router has in flight, on each worker where that is anything."""
        loads = {member.info.id: member.carried for member in self}
        return {worker: carried for worker, carried in loads.items() if carried != NOTHING}

    def share(self, others: Mapping[str, Carried], num_others: int) -> None:
        """What other routers have in flight now, by worker. `num_others`: that have any."""
        for member in self:
            member.share(others.get(member.info.id, NOTHING), num_others + 1)

    def reserve(self, attempt: Attempt) -> None:
        """Count an attempt as load of its workers at once; `release` ends it."""
        now = self._clock()
        self.changed.set()
        for member in self._carriers(attempt):
            member.num_seqs.place(len(attempt.choices))
            member.breaker.sent(attempt, now)
        if (decode := self.get(attempt.decode)) is not None:
            decode.kv_tokens.place(attempt.kv_tokens)
        if (prefill := self.get(attempt.prefill or attempt.decode)) is not None:
            prefill.prefill_tokens.place(attempt.prefill_tokens)
            prefill.meter.sent(attempt, attempt.prefill_tokens, now)

    def prefilled(self, attempt: Attempt) -> None:
        """The first output came: the prompt is not to be computed any more."""
        if (carrier := self.get(attempt.prefill or attempt.decode)) is not None:
            carrier.breaker.succeeded()
            if attempt.prefill is None:
                carrier.streams.add(attempt)
        member = self.get(attempt.prefill)
        # What a decode worker computes beside its residents says little of its speed, and a worker
        # that came back under its name never saw the prompt.
        # Nor does a prompt whose prefix was fetched first.
        if member is not None and attempt.fetch is None and member.meter.waits_for(attempt):
            cached = attempt.kv_tokens - attempt.prefill_tokens
            member.meter.computed(attempt, attempt.prefill_tokens, cached, self._clock())
        self._end_prefill(attempt)

    def _end_prefill(self, attempt: Attempt) -> None:
        assert not attempt.prefilled
        if (member := self.get(attempt.prefill or attempt.decode)) is not None:
            member.prefill_tokens.end(attempt.prefill_tokens)
            member.meter.dropped(attempt)
        attempt.prefilled = True

    def handed_over(self, attempt: Attempt) -> None:
        """The decode worker spoke: the prefill worker is done."""
        assert attempt.prefilled and not attempt.handed_over
        if (decode := self.get(attempt.decode)) is not None:
            decode.breaker.succeeded()
            decode.streams.add(attempt)
        if (member := self.get(attempt.prefill)) is not None:
            member.num_seqs.end(len(attempt.choices))
        attempt.handed_over = True

    def release(self, attempt: Attempt) -> None:
        """The attempt is over; what it still counts for ends."""
        self.changed.set()
        if not attempt.prefilled:
            self._end_prefill(attempt)
        for member in self._carriers(attempt):
            member.num_seqs.end(len(attempt.choices))
            member.breaker.ended(attempt)
        if (decode := self.get(attempt.decode)) is not None:
            decode.kv_tokens.end(attempt.kv_tokens)
            decode.streams.discard(attempt)

    def _carriers(self, attempt: Attempt) -> list[Member]:
        """Workers that still have something to do for the attempt."""
        members = [self.get(attempt.decode)]
        if not attempt.handed_over:
            members.append(self.get(attempt.prefill))
        return [member for member in members if member is not None]

    def _update_limits(self) -> None:
        infos = [member.info for member in self]
        capacity = max((m.capacity for m in self if m.info.role == "decode"), default=0)
        if not capacity:
            return
        context = min(capacity, *(info.max_model_len for info in infos))
        if self._max_model_len:
            context = min(context, self._max_model_len)
        vocab_size = min(info.vocab_size for info in infos)
        self.limits = Limits(context, vocab_size, infos[0].eos_token_ids)
