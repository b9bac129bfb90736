"""The queue of attempts for which no worker is free, and who of them is next.

By priority class, those that have tokens already first; then in turns of the tenants, each by the
tokens that it asks for (start-time fair queueing), then by deadline. Owned by `router.dispatch`,
which fills it, retries it when a worker has room and clears a request's entries when it ends.
"""

import asyncio
import itertools
import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from router.metrics import RouterMetrics
from router.request import Request

Rank = tuple[int, bool, float, float, int]
"""Priority class, whether it has no tokens yet, its turn, its deadline, its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What waits at most; more is refused. What was placed before waits whatever the bounds."""

    count: int = 1_024
    tokens: int = 1 << 24
    num_bytes: int = 1 << 30


@dataclass(slots=True, eq=False)
class Entry:
    """Choices of one request that are to be placed."""

    request: Request
    choices: tuple[int, ...]
    deadline: float = math.inf
    """Seconds of the event loop's clock at which it is to be refused."""
    timer: asyncio.TimerHandle | None = None
    """Ends its patience, if that ends; cancelled with the entry."""
    rank: Rank = (0, True, 0.0, 0.0, 0)
    removed: bool = False
    """It is in no queue any more."""
    num_tokens: int = field(init=False)
    """Prompt and tokens emitted so far: none are emitted while it waits."""
    needs_seat: bool = field(init=False)
    """A prefill worker alone cannot serve it."""
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        first = self.request.choices[self.choices[0]]
        self.num_tokens = len(self.request.prompt) + len(first.tokens)
        self.needs_seat = self.request.remaining(first) > 1
        self.num_bytes = self.request.num_bytes


class Misses:
    """What found no worker in one walk of the queue. Others of the same content that are as large
    would find none either, and need not be tried."""

    def __init__(self) -> None:
        self._least: dict[str | None, int] = {}
        """Content id -> tokens from which on nothing finds a worker; None: of any content."""

    def add(self, entry: Entry) -> None:
        # What some workers have refused for good says nothing of what others find there.
        if entry.needs_seat and not entry.request.refused:
            self._least[entry.request.content_id] = entry.num_tokens

    def __contains__(self, entry: Entry) -> bool:
        if not entry.needs_seat:
            return False
        kinds = (None, entry.request.content_id)
        return entry.num_tokens >= min(self._least.get(kind, math.inf) for kind in kinds)


class Turns:
    """Start-time fair queueing: who asked for little lately is next."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def take(self, tenant: str, tokens: int) -> float:
        """The turn of a request of so many tokens; lower ones come first."""
        start = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + tokens
        return start

    def passed(self, turn: float) -> None:
        """A request of this turn was served."""
        self._now = max(self._now, turn)


class WaitingQueue:
    def __init__(self, metrics: RouterMetrics, bounds: Bounds) -> None:
        self._bounds = bounds
        self._entries: list[Entry] = []
        self._turns = Turns()
        self._numbers = itertools.count()
        self._tokens = self._bytes = 0
        self._gauge = metrics.waiting

    def has_room(self, request: Request) -> bool:
        """Whether the request may wait."""
        bounds = self._bounds
        return (
            len(self._entries) < bounds.count
            and self._tokens + len(request.prompt) <= bounds.tokens
            and self._bytes + request.num_bytes <= bounds.num_bytes
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """The entries of this moment in order, without those that are removed meanwhile."""
        return (entry for entry in list(self._entries) if not entry.removed)

    def ahead_of(self, request: Request) -> Iterator[Entry]:
        """Those that `request`, which comes only now, must not overtake: of its class or a better
        one."""
        kind = _class(request)
        return itertools.takewhile(lambda entry: entry.rank[:2] <= kind, self)

    def add(self, entry: Entry) -> None:
        request = entry.request
        assert not request.over
        priority, is_new = _class(request)
        tokens = len(request.prompt) + request.params.max_tokens * len(entry.choices)
        turn = self._turns.take(request.tenant, tokens) if is_new else 0.0
        entry.rank = (priority, is_new, turn, entry.deadline, next(self._numbers))
        insort(self._entries, entry, key=lambda entry: entry.rank)
        self._count(entry, 1)

    def remove(self, entry: Entry) -> None:
        """It was placed."""
        self._turns.passed(entry.rank[2])
        self._drop(entry)

    def forget(self, request: Request) -> None:
        """Remove all that waits for `request`, which ended: nobody's turn came by that."""
        for entry in [entry for entry in self._entries if entry.request is request]:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
        self._entries.remove(entry)
        entry.removed = True
        if not self._entries:  # nobody is ahead of anybody any more
            self._turns = Turns()
        self._count(entry, -1)

    def _count(self, entry: Entry, sign: int) -> None:
        self._tokens += sign * len(entry.request.prompt)
        self._bytes += sign * entry.num_bytes
        self._gauge.set(len(self._entries))


def _class(request: Request) -> tuple[int, bool]:
    """Priority, and whether it has no tokens yet."""
    return request.params.priority, request.num_outputs == 0
