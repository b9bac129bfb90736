"""A simulated deployment: a router with its index and its placement, workers, and the clock.

One event per arrival, end of a prefill and late news; decode workers advance when they are looked
at. What a router would know is in the candidates and in the index; what happens is decided by the
workers' own caches.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from common.blockhash import BlockHash
from common.messages import KvLayoutInfo
from router.index import BlockIndex
from router.placement import Candidate, Placement, View
from router.simulate.cache import LruCache
from router.simulate.decode_worker import DecodeWorker
from router.simulate.failures import Failure
from router.simulate.job import Job
from router.simulate.model import Hardware
from router.simulate.policies import Ask, Policy
from router.simulate.prefill_worker import PrefillWorker
from router.simulate.trace import Request

_END = 1e9
"""Seconds after which nothing happens any more."""
LAYOUT = KvLayoutInfo(block_size=16, num_layers=1, num_kv_heads=1, head_dim=1, dtype="simulated")


class Cluster:
    def __init__(
        self,
        hardware: Hardware,
        num_prefill: int,
        num_decode: int,
        policy: Policy,
        *,
        seed: int = 0,
        staleness_s: float = 0.0,
        itl_s: float | None = None,
        failures: Sequence[Failure] = (),
    ) -> None:
        """`staleness_s`: how late the index learns what workers store and evict. `itl_s`: the limit
        of a decode step that placement is told."""
        self._hardware = hardware
        self._policy = policy
        self._rng = Random(seed)
        self._staleness_s = staleness_s
        self._itl_s = itl_s
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._now = 0.0
        pooled = LruCache(hardware.prefill_blocks * num_prefill) if policy.pooled else None
        self._prefills = [
            PrefillWorker(
                LruCache(hardware.prefill_blocks) if pooled is None else pooled,
                policy.shortest_first,
            )
            for _ in range(num_prefill)
        ]
        self._decodes = [DecodeWorker(hardware) for _ in range(num_decode)]
        self._pool: deque[Job] = deque()
        """The central queue of a pooled policy."""
        self._held = BlockIndex()
        """What workers have said that they hold."""
        self._planned = BlockIndex()
        """That, and what they will hold once they have computed what was placed on them."""
        self._candidates: list[Candidate] = []
        self._slots: dict[str, int] = {}
        for role, count in (("prefill", num_prefill), ("decode", num_decode)):
            for i in range(count):
                self._add(role, i)
        for failure in failures:
            self._at(failure.at, self._fail, failure)

    def run(
        self,
        requests: Sequence[Request],
        arrivals: Sequence[float],
        progress: Callable[[], object] = lambda: None,
    ) -> list[Job]:
        """Serve all requests to their end; one job per request, in their order."""
        jobs = [Job(r, at) for r, at in zip(requests, arrivals, strict=True)]
        events = self._events
        for job in jobs:
            while events and events[0][0] <= job.arrival:
                self._next()
            self._now = job.arrival
            self._arrive(job)
            progress()
        while events:
            self._next()
        for decode in self._decodes:
            decode.advance(_END)
        return jobs

    def _next(self) -> None:
        self._now, _, call, arguments = heapq.heappop(self._events)
        call(*arguments)

    def _at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, call, arguments))

    def _add(self, role: str, number: int) -> None:
        hardware = self._hardware
        blocks = hardware.prefill_blocks if role == "prefill" else hardware.decode_blocks
        id = f"{role[0]}{number}"
        self._candidates.append(
            Candidate(
                id=id,
                role=role,
                content_id="simulated",
                layout=LAYOUT,
                capacity=blocks * hardware.block_tokens,
                max_num_seqs=hardware.max_num_seqs,
                cost=hardware.cost,
                chunk_tokens=hardware.local_chunk_tokens,
                fetch_s=hardware.transfer(1),
            )
        )
        for index in (self._held, self._planned):
            slot = index.new_slot()
            index.assign(id, slot)
        self._slots[id] = slot

    # The router.

    def _arrive(self, job: Job) -> None:
        if self._policy.pooled:
            job.decode = min(range(len(self._decodes)), key=self._decode_load)
            self._reserve(job)
            self._pool.append(job)
            self._serve_pool()
            return
        placement = self._place(job)
        if placement is None:  # nobody is alive: it waits at the router
            self._at(self._now + 1.0, self._arrive, job)
        else:
            self._send(job, placement)

    def _place(self, job: Job) -> Placement | None:
        self._observe()
        blocks = job.request.blocks
        size = self._hardware.block_tokens
        view = View(
            num_tokens=job.tokens,
            remaining=job.left + 1,
            hits={k: v * size for k, v in self._planned.matches(blocks).items()},
            held={k: v * size for k, v in self._held.matches(blocks).items()},
            itl_s=self._itl_s,
        )
        return self._policy.place(Ask(view, blocks, size), self._candidates, self._rng)

    def _observe(self) -> None:
        """What the router knows of the workers' load now."""
        now = self._now
        for worker, candidate in zip(self._prefills, self._candidates, strict=False):
            candidate.ready = worker.alive
            candidate.queue_s = worker.wait_s(now)
            candidate.prefill_tokens = worker.queued_tokens
            candidate.num_seqs = worker.num_jobs
        for number, candidate in enumerate(self._candidates[len(self._prefills) :]):
            decode = self._decodes[number]
            decode.advance(now)
            candidate.queue_s = decode.wait_s()
            candidate.prefill_tokens = decode.local_tokens
            candidate.kv_tokens = decode.kv_tokens + decode.placed_tokens
            candidate.num_seqs = decode.num_seqs

    def _send(self, job: Job, placement: Placement) -> None:
        job.decode = int(placement.decode[1:]) if placement.decode is not None else -1
        blocks = job.request.blocks
        chosen = placement.prefill or placement.decode
        assert chosen is not None
        self._learn(self._planned, chosen, blocks)
        if placement.fetch is not None:
            self._fetch(job, chosen, placement.fetch)
        if placement.prefill is None:
            self._prefill_locally(job, chosen)
            return
        if job.decode >= 0:
            self._reserve(job)
        number = int(placement.prefill[1:])
        worker = self._prefills[number]
        job.prefill = number
        job.predicted_s = self._hardware.prefill(
            placement.uncached, job.tokens - placement.uncached
        )
        job.predicted_tokens = placement.uncached
        worker.add(job)
        self._serve(worker, number)

    def _worker(self, id: str) -> PrefillWorker | DecodeWorker:
        return (self._prefills if id[0] == "p" else self._decodes)[int(id[1:])]

    def _fetch(self, job: Job, id: str, owner_id: str) -> None:
        """Copy the longest prefix that the owner holds; its link sends one after the other."""
        worker, owner = self._worker(id), self._worker(owner_id)
        blocks = job.request.blocks
        count = owner.cache.match(blocks)
        missing = count - worker.cache.match(blocks)
        if missing <= 0:
            return
        prefix = blocks[:count]
        owner.cache.use(prefix)
        start = max(self._now, owner.link_free)
        owner.link_free = start + self._hardware.transfer(missing * self._hardware.block_tokens)
        job.fetched_at = owner.link_free
        self._store(worker.cache, id, prefix)

    def _prefill_locally(self, job: Job, id: str) -> None:
        decode = self._decodes[job.decode]
        blocks = job.request.blocks
        there = decode.cache.match(blocks) * self._hardware.block_tokens
        job.cached = min(there, job.tokens - 1)
        self._store(decode.cache, id, blocks, at_end=True)
        decode.prefill(job, max(self._now, job.fetched_at))
        ready = self._now + decode.wait_s()
        self._at(ready, self._stored, id, blocks)

    def _reserve(self, job: Job) -> None:
        decode = self._decodes[job.decode]
        decode.placed += 1
        decode.placed_tokens += job.tokens

    def _decode_load(self, number: int) -> float:
        decode = self._decodes[number]
        decode.advance(self._now)
        return decode.kv_tokens + decode.placed_tokens

    # The workers.

    def _serve_pool(self) -> None:
        for number, worker in enumerate(self._prefills):
            if not self._pool:
                return
            if worker.current is None and worker.alive:
                job = self._pool.popleft()
                job.prefill = number
                worker.add(job)
                self._serve(worker, number)

    def _serve(self, worker: PrefillWorker, number: int) -> None:
        """Begin with the next prompt, if the worker is idle and the prompt's prefix is there."""
        if worker.current is not None or not worker.queue:
            return
        now = self._now
        job = worker.take(now)
        if job is None:
            self._at(worker.ready_at(), self._wake, worker, number, worker.life)
            return
        blocks = job.request.blocks
        size = self._hardware.block_tokens
        job.cached = min(worker.cache.match(blocks) * size, job.tokens - 1)
        if self._policy.pooled:
            worker.cache.use(blocks)
        else:
            self._store(worker.cache, f"p{number}", blocks, at_end=True)
        worker.current = job
        worker.busy_until = now + self._hardware.prefill(job.tokens - job.cached, job.cached)
        self._at(worker.busy_until, self._prefilled, worker, number, worker.life)

    def _wake(self, worker: PrefillWorker, number: int, life: int) -> None:
        if worker.life == life:
            self._serve(worker, number)

    def _prefilled(self, worker: PrefillWorker, number: int, life: int) -> None:
        if worker.life != life:
            return
        job = worker.current
        assert job is not None
        worker.current = None
        worker.queued_tokens -= job.predicted_tokens
        if job.first is None:
            job.first = self._now
        if not self._policy.pooled:
            self._stored(f"p{number}", job.request.blocks)
        self._hand_over(job)
        if self._policy.pooled:
            self._serve_pool()
        else:
            self._serve(worker, number)

    def _hand_over(self, job: Job) -> None:
        if job.decode < 0:
            job.end = self._now
            return
        decode = self._decodes[job.decode]
        decode.advance(self._now)
        decode.placed -= 1
        decode.placed_tokens -= job.tokens
        if not job.left:
            job.end = self._now
            return
        # All but the last chunk was shipped while the rest was computed.
        size = self._hardware.block_tokens
        there = decode.cache.match(job.request.blocks) * size
        shipped = self._hardware.transfer(max(0, job.tokens - there))
        hidden = self._hardware.prefill(job.tokens - job.cached, job.cached)
        last = self._hardware.transfer(min(size, job.tokens))
        self._store(decode.cache, f"d{job.decode}", job.request.blocks)
        decode.join(job, self._now + max(last, shipped - hidden))

    def _store(
        self, cache: LruCache, id: str, blocks: Sequence[BlockHash], at_end: bool = False
    ) -> None:
        """Take blocks into a worker's cache and tell the index; `at_end`: of the stored ones
        later."""
        evicted = cache.use(blocks)
        if evicted:
            slot = self._slots[id]
            self._news(self._held.evict, slot, evicted)
            self._news(self._planned.evict, slot, evicted)
        if not at_end:
            self._stored(id, blocks)
            self._learn(self._planned, id, blocks)

    def _stored(self, id: str, blocks: Sequence[BlockHash]) -> None:
        self._news(self._learn, self._held, id, blocks)

    def _learn(self, index: BlockIndex, id: str, blocks: Sequence[BlockHash]) -> None:
        """Only what the index does not know yet: its work does not grow with the prompt."""
        known = index.matches(blocks).get(id, 0)
        index.store(self._slots[id], blocks[known:])

    def _news(self, change: Callable[..., None], *arguments: Any) -> None:
        if self._staleness_s:
            self._at(self._now + self._staleness_s, change, *arguments)
        else:
            change(*arguments)

    # Failures.

    def _fail(self, failure: Failure) -> None:
        number = int(failure.worker[1:])
        slot = self._slots[failure.worker]
        for index in (self._held, self._planned):
            index.drop(failure.worker)
            while not index.swept:
                index.sweep(1 << 20)
            fresh = index.new_slot()
            index.assign(failure.worker, fresh)
            assert fresh == slot
        if failure.worker[0] == "p":
            worker = self._prefills[number]
            lost = worker.fail()
            self._at(self._now + failure.down_s, self._recover, worker)
            for job in lost:
                decode = self._decodes[job.decode]
                decode.placed -= 1
                decode.placed_tokens -= job.tokens
        else:
            self._decodes[number].advance(self._now)
            lost = self._decodes[number].fail()
        for job in lost:
            self._arrive(job)

    def _recover(self, worker: PrefillWorker) -> None:
        worker.alive = True
