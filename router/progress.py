"""Whether a worker's engine moves. Pure: the caller brings what pongs say, and the time.

Kept by `router.fleet` for each member. A hung engine cannot be seen by the link: the worker's I/O
thread answers pings while the engine thread stands still.
"""

from collections import deque
from typing import Final

RECENT: Final = 64
"""Step intervals that are remembered."""
PATIENCE: Final = 3.0
"""An engine may take this many times the longest recent interval for one step."""


class Progress:
    def __init__(self, hang_s: float) -> None:
        """`hang_s`: how long a step may take in any case."""
        self.hung = False
        """The engine has work and its step counter stands still."""
        self._hang_s = hang_s
        self._steps = -1
        self._heard = 0.0
        self._standing_s = 0.0
        self._intervals: deque[float] = deque(maxlen=RECENT)

    @property
    def limit_s(self) -> float:
        return max(self._hang_s, PATIENCE * max(self._intervals, default=0.0))

    def report(self, steps: int, busy: bool, now: float) -> None:
        """What a pong said. `now`: monotonic seconds.

        A router that was paused itself reads old pongs late: no gap between two of them counts
        for more than half the limit, so that one alone proves nothing.
        """
        if self._steps >= 0:
            self._standing_s += min(now - self._heard, self.limit_s / 2)
        self._heard = now
        if steps != self._steps or not busy:
            # A step that took long and ended was no hang: be more patient with the next.
            if self._standing_s and steps != self._steps:
                self._intervals.append(self._standing_s)
            self._steps, self._standing_s, self.hung = steps, 0.0, False
        else:
            self.hung = self._standing_s > self.limit_s
