"""Where a request goes: `place` chooses prefill and decode worker together. Pure: no I/O, no clock.

Called by `router.service` with a view of the request and a snapshot of the workers, and by the
simulator with its own. Everything is counted in tokens: what a prefill worker has to compute
before this prompt's first token, and what a decode worker already holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeVar

from common.messages import KvLayoutInfo

_Option = TypeVar("_Option")

LOCAL_TOKENS: Final = 64
"""Uncached prompt tokens up to which a decode worker that caches the rest prefills itself: about
one step beside its residents, cheaper than another worker and a transfer."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    kv_tokens: int = 0
    """Tokens that its sequences hold or will hold once they arrive."""
    num_seqs: int = 0
    ready: bool = True
    """Takes new work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One attempt to be placed."""

    num_tokens: int
    """Prompt and tokens emitted so far."""
    num_choices: int = 1
    remaining: int
    """Output tokens that each choice may still get."""
    hits: Mapping[str, int] = field(default_factory=dict)
    """Worker id -> tokens of the prompt that its cache holds."""
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


def place(view: View, snapshot: Sequence[Candidate], rng: Random) -> Placement | None:
    """The best placement, or None if no worker can take the attempt now."""
    usable = [
        worker
        for worker in snapshot
        if worker.ready
        and worker.id not in view.avoid
        and worker.capacity > view.num_tokens
        and view.content_id in (None, worker.content_id)
    ]
    prefills = [worker for worker in usable if worker.role == "prefill"]
    decodes = [worker for worker in usable if worker.role == "decode"]
    if view.remaining == 1 and prefills:
        chosen = _cheapest(((_prefill_cost(view, p), _load(p), p) for p in prefills), rng)
        return Placement(chosen.id, None, _uncached(view, chosen))
    best: list[tuple[float, float, Placement]] = []
    for decode in decodes:
        decode_cost = _decode_cost(view, decode)
        partners = [p for p in prefills if _fits(view, p, decode)]
        hit = view.hits.get(decode.id, 0)
        if not partners or (hit and _uncached(view, decode) <= LOCAL_TOKENS):
            cost = decode_cost + _prefill_cost(view, decode)
            local = Placement(None, decode.id, _uncached(view, decode))
            best.append((cost, _load(decode), local))
            continue
        for prefill in partners:
            best.append(
                (
                    decode_cost + _prefill_cost(view, prefill),
                    _load(decode) + _load(prefill),
                    Placement(prefill.id, decode.id, _uncached(view, prefill)),
                )
            )
    if not best:
        return None
    return _cheapest(best, rng)


def _fits(view: View, prefill: Candidate, decode: Candidate) -> bool:
    """Blocks of one may be used by the other, and there is a way between them."""
    return (
        prefill.content_id == decode.content_id
        and prefill.layout == decode.layout
        and (prefill.id, decode.id) not in view.avoid_pairs
    )


def _uncached(view: View, worker: Candidate) -> int:
    """At least one token is always computed."""
    return max(1, view.num_tokens - view.hits.get(worker.id, 0))


def _prefill_cost(view: View, worker: Candidate) -> int:
    """Tokens that the worker computes until this prompt's first token is there."""
    return worker.prefill_tokens + _uncached(view, worker)


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
    return rng.choice([option for cost, load, option in listed if (cost, load) == least])
