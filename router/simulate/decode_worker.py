"""A simulated decode worker: continuous batching, and prompts that it prefills itself in chunks.

Time passes only in `advance`, many steps at once while the batch stays the same, so that a run
costs per request and not per token.
"""

import heapq
import math
from collections import deque

from router.simulate.cache import LruCache
from router.simulate.job import Job
from router.simulate.model import Hardware


class DecodeWorker:
    def __init__(self, hardware: Hardware) -> None:
        self.cache = LruCache(hardware.decode_blocks)
        self.link_free = 0.0
        """When its link has sent what was fetched from it."""
        self.placed_tokens = 0
        """Tokens of sequences that were placed here and have not arrived yet."""
        self.placed = 0
        self.kv_tokens = 0
        """Tokens of the running sequences."""
        self.local_tokens = 0
        """Prompt tokens that it still has to compute itself."""
        self._hardware = hardware
        self._capacity = hardware.decode_blocks * hardware.block_tokens
        self._reserved = 0
        """Tokens that the running sequences hold when they end."""
        self._now = 0.0
        self._step = 0
        self._running: list[tuple[int, int, Job]] = []
        self._coming: list[tuple[float, int, Job]] = []
        self._waiting: deque[Job] = deque()
        self._local: deque[tuple[Job, int, float]] = deque()
        """Jobs with their new tokens and seconds of compute."""
        self._local_end = 0
        self._number = 0

    @property
    def num_seqs(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._coming) + self.placed

    def join(self, job: Job, at: float) -> None:
        """A prefilled sequence is here at `at`."""
        self._number += 1
        heapq.heappush(self._coming, (at, self._number, job))

    def prefill(self, job: Job, now: float) -> None:
        """Compute what of a prompt is not cached here, after the prompts that were given before."""
        self.advance(now)
        hardware = self._hardware
        new = job.tokens - job.cached
        if not self._running and not self._local:
            self._now = max(self._now, now)
        self._local.append((job, new, hardware.cost_prefill(new, job.cached)))
        self.local_tokens += new
        if len(self._local) == 1:
            self._begin_local()

    def wait_s(self) -> float:
        """Seconds until the prompts that it was given are computed, as far as it knows now."""
        if not self._local:
            return 0.0
        total = 0.0
        step = self._step_s()
        for position, (_, new, seconds) in enumerate(self._local):
            steps = self._chunks(new)
            left = self._local_end - self._step if position == 0 else steps
            total += left * (step + seconds / steps)
        return total

    def advance(self, now: float) -> None:
        """Let time pass until `now`; a step that has begun is finished."""
        while True:
            if not self._running and not self._local:
                if not self._waiting and (not self._coming or self._coming[0][0] > now):
                    return
                if not self._waiting:
                    self._now = max(self._now, self._coming[0][0])
            self._admit()
            if self._now >= now:
                return
            limit = now
            if self._coming and self._coming[0][0] < now:
                limit = self._coming[0][0]
            self._steps(limit)

    def fail(self) -> list[Job]:
        """All that it held is lost; the jobs that were here, with what they have emitted."""
        lost = [job for _, _, job in self._running]
        for job in lost:
            job.emitted += self._step - job.joined_step
        lost += [job for _, _, job in self._coming] + list(self._waiting)
        lost += [job for job, _, _ in self._local]
        self._running.clear()
        self._coming.clear()
        self._waiting.clear()
        self._local.clear()
        self.cache.clear()
        self.kv_tokens = self.local_tokens = self._reserved = 0
        return lost

    def _chunks(self, new: int) -> int:
        return -(-new // self._hardware.local_chunk_tokens)

    def _begin_local(self) -> None:
        self._local_end = self._step + self._chunks(self._local[0][1])

    def _step_s(self) -> float:
        if not self._running:
            return 0.0
        hardware = self._hardware
        batch = len(self._running)
        return hardware.step_s + hardware.row_s * batch + hardware.kv_s * self.kv_tokens

    def _admit(self) -> None:
        while self._coming and self._coming[0][0] <= self._now:
            self._waiting.append(heapq.heappop(self._coming)[2])
        while self._waiting and len(self._running) < self._hardware.max_num_seqs:
            job = self._waiting[0]
            need = job.request.prompt + job.request.output
            if self._running and self._reserved + need > self._capacity:
                return
            self._waiting.popleft()
            self._reserved += need
            job.joined_step = self._step
            job.finish_step = self._step + job.left
            self.kv_tokens += job.tokens + 1
            self._number += 1
            heapq.heappush(self._running, (job.finish_step, self._number, job))

    def _steps(self, limit: float) -> None:
        """Whole steps of one batch: until it changes, or the first that ends at `limit` or
        later."""
        first = self._step_s()
        most = self._running[0][0] - self._step if self._running else None
        if self._local:
            _, new, seconds = self._local[0]
            first += seconds / self._chunks(new)
            left = self._local_end - self._step
            most = left if most is None else min(most, left)
        assert most is not None
        growth = self._hardware.kv_s * len(self._running)
        count = max(1, min(most, _count(first, growth, limit - self._now))) if most else 0
        self._now += count * first + growth * count * (count - 1) / 2
        self._step += count
        self.kv_tokens += count * len(self._running)
        while self._running and self._running[0][0] == self._step:
            job = heapq.heappop(self._running)[2]
            job.end = self._now
            self.kv_tokens -= job.tokens + 1 + self._step - job.joined_step
            self._reserved -= job.request.prompt + job.request.output
        if self._local and self._step == self._local_end:
            job, new, _ = self._local.popleft()
            self.local_tokens -= new
            if job.first is None:
                job.first = self._now
            if job.left:
                self._waiting.appendleft(job)
            else:
                job.end = self._now
            if self._local:
                self._begin_local()


def _count(first: float, growth: float, span: float) -> int:
    """The least n >= 0 with n * first + growth * n * (n - 1) / 2 >= span."""
    if span <= 0:
        return 0
    if growth * span < 1e-9 * first * first:
        return math.ceil(span / first)
    b = first - growth / 2
    return math.ceil((math.sqrt(b * b + 2 * growth * span) - b) / growth)
