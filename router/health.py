"""Which live workers get no work for a while, and how fast failed work is placed again. Pure: the
caller brings the time.

    Breaker      one worker fails again and again: closed -> open -> half open (one request) -> ...
    Outliers     one worker is far slower than its peers: out for a while, never too many at once
    RetryBudget  what failed is placed anew at a bounded rate, so that a failure is no avalanche

Kept by `router.fleet` and `router.dispatch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Final

FAILURES: Final = 5
"""In a row, until a breaker opens."""
OPEN_S: Final = (1.0, 30.0)
"""For how long a breaker opens: at first, doubled each time in a row, and at most."""
SLOW: Final = 4.0
"""Times the median of its peers at which a worker is an outlier."""
SEEN: Final = 16
"""Observations without which nobody is an outlier."""
OUT_S: Final = 10.0
OUT_PART: Final = 1 / 3
"""Of the workers of a role that may be out at a time; none of one or two."""
BUDGET: Final = 0.2
"""Of the live requests that may be placed again at once."""
BUDGET_LEAST: Final = 16
REFILL_S: Final = 0.5
"""In which an empty budget is full again."""


class Breaker:
    def __init__(self) -> None:
        self._failures = 0
        self._open_until = 0.0
        self._open_s = OPEN_S[0]
        self._probe: object | None = None
        """The one attempt that a half open worker has got."""

    def failed(self, now: float) -> bool:
        """True if it opens by this failure."""
        self._failures += 1
        if self._failures < FAILURES or now < self._open_until:
            return False
        self._open_until = now + self._open_s
        self._open_s = min(2 * self._open_s, OPEN_S[1])
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._open_until, self._open_s = 0.0, OPEN_S[0]
        self._probe = None

    def allows(self, now: float) -> bool:
        """Whether the worker may get one more; after a time open, one alone shows how it is."""
        if self._failures < FAILURES:
            return True
        return now >= self._open_until and self._probe is None

    def sent(self, attempt: object, now: float) -> None:
        """The worker gets the attempt."""
        if self._failures >= FAILURES and self.allows(now):
            self._probe = attempt

    def ended(self, attempt: object) -> None:
        """The attempt is over, whatever came of it."""
        if self._probe is attempt:
            self._probe = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow a worker is: 1 is as predicted for all of its role."""

    slowness: float
    seen: int


class Outliers:
    """Of the workers of one role."""

    def __init__(self) -> None:
        self._out: dict[str, float] = {}

    def out(self, worker: str, now: float) -> bool:
        return now < self._out.get(worker, 0.0)

    def review(self, paces: Mapping[str, Pace], now: float) -> list[str]:
        """Eject those that are far slower than the others, the slowest first; returns them.

        They get nothing meanwhile: what was seen of them before is not to count afterwards.
        """
        self._out = {w: until for w, until in self._out.items() if now < until and w in paces}
        known = {worker: p.slowness for worker, p in paces.items() if p.seen >= SEEN}
        room = int(OUT_PART * len(paces)) - len(self._out)
        ejected: list[str] = []
        for worker in sorted(known, key=lambda worker: -known[worker])[: max(0, room)]:
            others = [slowness for other, slowness in known.items() if other != worker]
            if worker in self._out or not others or known[worker] < SLOW * median(others):
                continue
            self._out[worker] = now + OUT_S
            ejected.append(worker)
        return ejected


class RetryBudget:
    """A token bucket that may be in debt: what comes too early waits its turn."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._tokens = float(BUDGET_LEAST)
        self._at = 0.0

    def delay_s(self, num_live: int, now: float) -> float:
        """Take a token for one placement; how long it has to wait for it, with jitter."""
        most = max(BUDGET_LEAST, BUDGET * num_live)
        rate = most / REFILL_S
        self._tokens = min(most, self._tokens + (now - self._at) * rate)
        self._at = now
        self._tokens -= 1
        if self._tokens >= 0:
            return 0.0
        return -self._tokens / rate * self._rng.uniform(0.5, 1.5)
