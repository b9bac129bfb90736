"""Where a request goes: `place` chooses mode, prefill and decode worker together. Pure: no I/O, no
clock.

Called by `router.dispatch` with a view of the request and a snapshot of the workers, and by the
simulator with its own. Costs are predicted seconds, from the cost model of each worker:

    prefill worker:  wait + WORK * compute + HOLD * (blocks that its cache must take in)
    decode worker:   what its steps read beside this sequence, what is shipped, the wait for a seat

`compute` counts `WORK` times: once for this prompt, and for those that will wait behind it. The
wait is the longer of the worker's queue and of a prefix's way from another worker that holds it.
A decode worker may prefill itself, beside its residents, if their steps stay within their limit
and no seat is wanting; their steps, which it makes anyway, count once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from common.cost import PRIOR, CostModel
from common.messages import KvLayoutInfo

_Option = TypeVar("_Option")

LOCAL_TOKENS: Final = 64
"""Uncached prompt tokens up to which a decode worker that caches the rest prefills itself: about
one step beside its residents, cheaper than another worker and a transfer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What placement weighs against a second of this request's own wait."""

    work: float = 4.0
    """A second of compute: this prompt's, and that of those who come to wait behind it."""
    hold: float = 0.5
    """A second that it took to compute what a cache evicts to take in what it lacks. Where caches
    are scarce and most prompts come back, this is what keeps a session in one place."""
    decode: float = 64.0
    """A second that one more read of a decode worker's KV takes: steps that it is felt in."""
    local: float = 0.8
    """Part of the limit of a step that a decode worker's prefill may fill."""


WEIGHTS: Final = Weights()


class Queued(NamedTuple):
    """A prompt that a prefill worker still has to compute."""

    tokens: int
    after: float
    """Prompts of fewer tokens are computed before it."""


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One live worker as placement sees it; load includes what this router has in flight."""

    id: str
    role: str
    content_id: str
    layout: KvLayoutInfo
    capacity: int
    """Tokens that its whole KV pool holds."""
    max_num_seqs: int
    prefill_tokens: int = 0
    """Prompt tokens that it still has to compute."""
    queue_s: float | None = None
    """Seconds until it has computed them; None: as its cost model says."""
    queue: Sequence[Queued] = ()
    """What is known of them, prompt by prompt."""
    kv_tokens: int = 0
    """Tokens that its sequences hold or will hold once they arrive."""
    num_seqs: int = 0
    ready: bool = True
    """Takes new work."""
    serves: bool = True
    """Takes new work as soon as it has room."""
    cost: CostModel = PRIOR
    chunk_tokens: int = 512
    """Prompt tokens that a decode worker computes in one step beside its residents."""
    fetch_s: float | None = None
    """Seconds per token of a prefix that another worker sends it; None: it cannot fetch."""
    fetch_base_s: float = 0.0
    """Seconds that any such fetch takes besides."""

    @property
    def wait_s(self) -> float:
        """Seconds until it can start with another prompt."""
        if self.queue_s is not None:
            return self.queue_s
        return self.prefill_tokens * self.cost.token_s


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One attempt to be placed."""

    num_tokens: int
    """Prompt and tokens emitted so far."""
    num_choices: int = 1
    remaining: int
    """Output tokens that each choice may still get."""
    hits: Mapping[str, int] = field(default_factory=dict)
    """Worker id -> tokens of the prompt that its cache holds, or will hold once it has computed
    what it was given."""
    held: Mapping[str, int] = field(default_factory=dict)
    """Worker id -> tokens of the prompt that others can fetch from it now."""
    itl_s: float | None = None
    """Limit of a decode step; None: decode workers prefill only where no prefill worker can."""
    avoid: frozenset[str] = frozenset()
    """Workers that this attempt must not use."""
    avoid_pairs: frozenset[tuple[str, str]] = frozenset()
    """Prefill and decode worker between which this attempt must not ship."""
    content_id: str | None = None
    """Only workers of this content, if the request has begun on one."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` None: the decode worker prefills itself. `decode` None: the first token is the
    last one. Never both None."""

    prefill: str | None
    decode: str | None
    uncached: int
    """Prompt tokens that are computed, by whoever prefills."""
    fetch: str | None = None
    """The worker whose blocks the one that prefills fetches first."""
    ttft_s: float = field(default=0.0, compare=False)
    """Predicted seconds to the first token."""
    fetch_within_s: float = field(default=0.0, compare=False)
    """After so long the fetch would have saved nothing."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one worker would prefill: `score` is `wait_s + weights.work * compute_s + hold`."""

    score: float
    wait_s: float
    """Until it can begin, and while its residents' steps go on beside it."""
    compute_s: float
    hold: float
    load: float
    worker: Candidate
    uncached: int
    fetch: str | None
    within_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.compute_s

    def placement(self, decode: str | None) -> Placement:
        prefill = self.worker.id if self.worker.role == "prefill" else None
        return Placement(prefill, decode, self.uncached, self.fetch, self.ttft_s, self.within_s)


def place(
    view: View, snapshot: Sequence[Candidate], rng: Random, weights: Weights = WEIGHTS
) -> Placement | None:
    """The best placement, or None if no worker can take the attempt now."""
    usable = [
        worker
        for worker in snapshot
        if worker.ready
        and worker.capacity > view.num_tokens
        and worker.id not in view.avoid
        and view.content_id in (None, worker.content_id)
    ]
    owner = _owner(view, snapshot)
    plans = [_remote(view, p, owner, weights) for p in usable if p.role == "prefill"]
    if view.remaining == 1 and plans:
        return _cheapest(((p.score, p.load, p) for p in plans), rng).placement(None)
    firsts = _Firsts(view, plans, rng)
    best: list[tuple[float, float, Placement]] = []
    for decode in usable:
        if decode.role != "decode":
            continue
        cost = _decode_cost(view, decode) * decode.cost.kv_s * weights.decode
        first = firsts.of(decode)
        if first is not None:
            best.append(
                (cost + first.score, _load(decode) + first.load, first.placement(decode.id))
            )
        if first is None or _may_prefill(view, decode, weights):
            plan = _local(view, decode, owner, weights)
            best.append((cost + plan.score, plan.load, plan.placement(decode.id)))
    return _cheapest(best, rng) if best else None


def _remote(view: View, worker: Candidate, owner: Candidate | None, weights: Weights) -> _Plan:
    return _better(view, worker, owner, weights, 0.0)


def _local(view: View, decode: Candidate, owner: Candidate | None, weights: Weights) -> _Plan:
    """The decode worker computes a chunk in each of its steps."""
    cost = decode.cost
    step = cost.step(decode.num_seqs, decode.kv_tokens) if decode.num_seqs else 0.0
    return _better(view, decode, owner, weights, step)


def _better(
    view: View, worker: Candidate, owner: Candidate | None, weights: Weights, step: float
) -> _Plan:
    """The better of computing all that the worker lacks and of fetching a part of it first.

    `step`: seconds of its residents' steps, one for each chunk. Only this prompt waits for them:
    the worker makes them anyway.
    """
    cost, wait, total = worker.cost, worker.wait_s, view.num_tokens

    def after(ready: float, new: int) -> tuple[float, float, float]:
        """Score, wait and compute."""
        compute = cost.prefill(new, total - new)
        ready += step * -(-new // worker.chunk_tokens) if step else 0.0
        return ready + weights.work * compute, ready, compute

    here = min(view.hits.get(worker.id, 0), total - 1)
    new, fetch, within = total - here, None, 0.0
    score, waits, compute = after(wait, new)
    if owner is not None and owner.id != worker.id and worker.fetch_s is not None:
        held = min(view.held[owner.id], total - 1)
        if held > here and _kind(owner) == _kind(worker):
            way = worker.fetch_base_s + (held - here) * worker.fetch_s
            fetched = after(max(wait, way), total - held)
            if fetched[0] < score:
                within = score - after(0.0, total - held)[0]
                (score, waits, compute), new, fetch = fetched, total - held, owner.id
    hold = weights.hold * (total - here) * cost.token_s
    return _Plan(score + hold, waits, compute, hold, _load(worker), worker, new, fetch, within)


def _may_prefill(view: View, decode: Candidate, weights: Weights) -> bool:
    """The residents' steps bear a prefill beside them, and nobody waits for a seat."""
    if view.itl_s is None:
        return False
    uncached = _uncached(view, decode)
    if view.hits.get(decode.id, 0) and uncached <= LOCAL_TOKENS:
        return True
    if decode.num_seqs + view.num_choices > decode.max_num_seqs:
        return False
    chunk = min(uncached, decode.chunk_tokens)
    cost = decode.cost
    longest = cost.step(decode.num_seqs + 1, decode.kv_tokens + view.num_tokens) + chunk * (
        cost.token_s + cost.pair_s * view.num_tokens
    )
    return longest <= weights.local * view.itl_s


class _Firsts:
    """The best prefill plan for each decode worker: blocks of one may be used by the other, and
    there is a way between them."""

    def __init__(self, view: View, plans: Sequence[_Plan], rng: Random) -> None:
        self._avoid = view.avoid_pairs
        self._rng = rng
        self._groups: dict[tuple[str, KvLayoutInfo], list[_Plan]] = {}
        self._best: dict[tuple[str, KvLayoutInfo], _Plan] = {}
        for plan in plans:
            key = _kind(plan.worker)
            self._groups.setdefault(key, []).append(plan)

    def of(self, decode: Candidate) -> _Plan | None:
        key = _kind(decode)
        group = self._groups.get(key)
        if group is None:
            return None
        if self._avoid:
            group = [p for p in group if (p.worker.id, decode.id) not in self._avoid]
            return self._cheapest(group) if group else None
        if key not in self._best:
            self._best[key] = self._cheapest(group)
        return self._best[key]

    def _cheapest(self, group: Sequence[_Plan]) -> _Plan:
        return _cheapest(((p.score, p.load, p) for p in group), self._rng)


def _owner(view: View, snapshot: Sequence[Candidate]) -> Candidate | None:
    """The worker that most of the prompt can be fetched from."""
    held = (worker for worker in snapshot if worker.id in view.held)
    return max(held, key=lambda worker: view.held[worker.id], default=None)


def _kind(worker: Candidate) -> tuple[str, KvLayoutInfo]:
    """Workers of one kind may exchange blocks; those of different sizes are cut on the way."""
    return worker.content_id, replace(worker.layout, block_size=0)


def _uncached(view: View, worker: Candidate) -> int:
    """At least one token is always computed."""
    return max(1, view.num_tokens - view.hits.get(worker.id, 0))


def _decode_cost(view: View, worker: Candidate) -> int:
    """KV that every step reads beside this sequence, what is shipped, and the wait for a seat."""
    waiting = max(0, worker.num_seqs + view.num_choices - worker.max_num_seqs)
    shipped = max(0, view.num_tokens - view.hits.get(worker.id, 0))
    over = max(0, worker.kv_tokens + view.num_tokens - worker.capacity)
    return worker.kv_tokens + shipped + over + waiting * view.num_tokens


def _load(worker: Candidate) -> float:
    return worker.num_seqs / worker.max_num_seqs


def _cheapest(options: Iterable[tuple[float, float, _Option]], rng: Random) -> _Option:
    """Least cost, then least load, then random."""
    listed = list(options)
    least = min((cost, load) for cost, load, _ in listed)
    best = [option for cost, load, option in listed if (cost, load) == least]
    return best[0] if len(best) == 1 else rng.choice(best)


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker would have cost, for people to read. `place` adds `wait_s`, `work` and `hold`
    of whoever prefills to `decode` of the decode worker, and takes the least sum."""

    worker: str
    role: str
    objection: str
    """Why it cannot be used; empty: it can."""
    hit_tokens: int
    uncached_tokens: int
    fetch: str | None
    wait_s: float
    work: float
    hold: float
    decode: float | None
    """None: it does not decode."""
    prefills: bool
    """It may compute the prompt."""
    ttft_s: float


def weigh(view: View, snapshot: Sequence[Candidate], weights: Weights = WEIGHTS) -> list[Weighed]:
    """The terms that `place` decides by, worker by worker."""
    owner = _owner(view, snapshot)
    return [_weigh(view, worker, owner, weights) for worker in snapshot]


def _weigh(view: View, worker: Candidate, owner: Candidate | None, weights: Weights) -> Weighed:
    decodes = worker.role == "decode"
    plan = (_local if decodes else _remote)(view, worker, owner, weights)
    return Weighed(
        worker=worker.id,
        role=worker.role,
        objection=_objection(view, worker),
        hit_tokens=min(view.hits.get(worker.id, 0), view.num_tokens),
        uncached_tokens=plan.uncached,
        fetch=plan.fetch,
        wait_s=plan.wait_s,
        work=weights.work * plan.compute_s,
        hold=plan.hold,
        decode=_decode_cost(view, worker) * worker.cost.kv_s * weights.decode if decodes else None,
        prefills=not decodes or _may_prefill(view, worker, weights),
        ttft_s=plan.ttft_s,
    )


def _objection(view: View, worker: Candidate) -> str:
    if not worker.ready:
        return "not ready"
    if worker.capacity <= view.num_tokens:
        return "too small"
    if worker.id in view.avoid:
        return "avoided"
    return "" if view.content_id in (None, worker.content_id) else "another model"
