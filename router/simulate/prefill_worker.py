"""A simulated prefill worker: prompts one after the other, and a cache of prefixes.

Ours takes the prompt with the least left first, as `prefill.scheduler` does; who waits ages by the
tokens that are computed meanwhile. Other systems' workers serve in order of arrival. A prompt that
has begun is computed to its end.
"""

from router.simulate.cache import LruCache
from router.simulate.job import Job


class PrefillWorker:
    def __init__(self, cache: LruCache, shortest_first: bool = False) -> None:
        self.cache = cache
        self.queue: list[Job] = []
        """In order of arrival."""
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
        self._shortest_first = shortest_first
        self._num_computed = 0
        """Tokens, as predicted."""

    def add(self, job: Job) -> None:
        job.turn = self._num_computed + job.predicted_tokens
        self.queue.append(job)
        self.queued_s += job.predicted_s
        self.queued_tokens += job.predicted_tokens

    def take(self, now: float) -> Job | None:
        """The prompt to begin with, which leaves the queue; None if there is none whose prefix is
        here already."""
        chosen = None
        for job in self.queue:
            if job.fetched_at <= now and (chosen is None or job.turn < chosen.turn):
                chosen = job
            if not self._shortest_first:
                break
        if chosen is not None:
            self.queue.remove(chosen)
            self.queued_s = self.queued_s - chosen.predicted_s if self.queue else 0.0
            self._num_computed += chosen.predicted_tokens
        return chosen

    def ready_at(self) -> float:
        """When the prefix of a queued prompt is here for which the worker waits."""
        if self._shortest_first:
            return min(job.fetched_at for job in self.queue)
        return self.queue[0].fetched_at

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
