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
    """What waits at most; more is refused."""

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
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = self.request.num_bytes


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
        for entry in list(self._entries):
            if entry in self._entries:
                yield entry

    def add(self, entry: Entry) -> None:
        request = entry.request
        assert not request.over
        resumes = request.num_outputs > 0
        tokens = len(request.prompt) + request.params.max_tokens * len(entry.choices)
        turn = 0.0 if resumes else self._turns.take(request.tenant, tokens)
        priority, number = request.params.priority, next(self._numbers)
        entry.rank = (priority, not resumes, turn, entry.deadline, number)
        insort(self._entries, entry, key=lambda entry: entry.rank)
        self._count(entry, 1)

    def remove(self, entry: Entry) -> None:
        """It was placed, or its request ended."""
        if entry.timer is not None:
            entry.timer.cancel()
        self._entries.remove(entry)
        self._turns.passed(entry.rank[2])
        if not self._entries:  # nobody is ahead of anybody any more
            self._turns = Turns()
        self._count(entry, -1)

    def forget(self, request: Request) -> None:
        """Remove all that waits for `request`."""
        for entry in [entry for entry in self._entries if entry.request is request]:
            self.remove(entry)

    def _count(self, entry: Entry, sign: int) -> None:
        self._tokens += sign * len(entry.request.prompt)
        self._bytes += sign * entry.num_bytes
        self._gauge.set(len(self._entries))
