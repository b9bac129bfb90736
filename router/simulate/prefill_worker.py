"""A simulated prefill worker: prompts one after the other, and a cache of prefixes."""

from collections import deque

from router.simulate.cache import LruCache
from router.simulate.job import Job


class PrefillWorker:
    def __init__(self, cache: LruCache) -> None:
        self.cache = cache
        self.queue: deque[Job] = deque()
        self.current: Job | None = None
        self.busy_until = 0.0
        self.queued_s = 0.0
        """Predicted seconds of the queue."""
        self.queued_tokens = 0
        """Prompt tokens to compute, queued and running, as predicted."""
        self.link_free = 0.0
        """When its link has sent what was fetched from it."""
        self.life = 0
        """Raised when it fails: what its former life had begun never ends."""
        self.alive = True

    @property
    def num_jobs(self) -> int:
        return len(self.queue) + (self.current is not None)

    def wait_s(self, now: float) -> float:
        return max(0.0, self.busy_until - now) + self.queued_s

    def fail(self) -> list[Job]:
        """All that it held is lost; its jobs."""
        jobs = [*([self.current] if self.current is not None else []), *self.queue]
        self.cache.clear()
        self.queue.clear()
        self.current = None
        self.busy_until = self.queued_s = 0.0
        self.queued_tokens = 0
        self.life += 1
        self.alive = False
        return jobs
