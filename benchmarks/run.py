"""Runs queries against a server: open loop (arrival times) or closed loop (concurrency)."""

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from tqdm import tqdm

from benchmarks.client import Record, Target, send
from benchmarks.datasets import Query


@dataclass(frozen=True, slots=True)
class Plan:
    """Queries and when each is due (seconds from the start of the run)."""

    queries: Sequence[Query]
    due: Sequence[float]
    max_concurrency: int = 0
    """Requests in flight at most; 0: no limit. A request over the limit is sent late."""
    max_seconds: float = 0.0
    """The run is cut after this time; what is unfinished counts as errors. 0: no limit."""


async def run(target: Target, plan: Plan, *, warmups: int = 0, progress: bool = True) -> "Run":
    """Send the plan and wait for all answers.

    Conversation turns wait for the turn that they follow; their due time is then the later of
    the two.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for query in plan.queries[:warmups]:
            warm = await send(session, target, list(query.tokens), query.output_len, 0.0)
            if not warm.ok:
                raise ConnectionError(f"warm-up request failed: {warm.error}")
        return await _Runner(session, target, plan, progress).run()


@dataclass(frozen=True, slots=True)
class Run:
    records: list[Record]
    cpu_share: float
    """CPU seconds of this process per second of the run."""


class _Runner:
    def __init__(
        self, session: aiohttp.ClientSession, target: Target, plan: Plan, progress: bool
    ) -> None:
        self.session = session
        self.target = target
        self.plan = plan
        self.limit = asyncio.Semaphore(plan.max_concurrency or len(plan.queries) + 1)
        self.bar = tqdm(
            total=len(plan.queries),
            disable=not progress,
            file=sys.stderr,
            unit="req",
            mininterval=0.5,
        )
        self.histories: dict[int, asyncio.Future[list[int]]] = {}
        self.recent: list[Record] = []

    async def run(self) -> Run:
        loop = asyncio.get_running_loop()
        self.histories = {
            q.follows: loop.create_future() for q in self.plan.queries if q.follows is not None
        }
        cpu, start = time.process_time(), time.perf_counter()
        tasks = [
            asyncio.create_task(self._one(number, start))
            for number in range(len(self.plan.queries))
        ]
        try:
            async with asyncio.timeout(self.plan.max_seconds or None):
                records = await asyncio.gather(*tasks)
        except TimeoutError:
            records = [self._cut(task, start) for task in tasks]
        self.bar.close()
        elapsed = time.perf_counter() - start
        return Run(list(records), (time.process_time() - cpu) / elapsed)

    async def _one(self, number: int, start: float) -> Record:
        query = self.plan.queries[number]
        due = start + self.plan.due[number]
        tokens = list(query.tokens)
        if query.follows is not None:
            tokens = await self.histories[query.follows] + tokens
            due = max(due, time.perf_counter())
        await asyncio.sleep(due - time.perf_counter())
        async with self.limit:
            # With a concurrency limit the request is due when its turn comes (closed loop).
            if self.plan.max_concurrency:
                due = time.perf_counter()
            record = await send(self.session, self.target, tokens, query.output_len, due)
        if number in self.histories:
            answer = record.token_ids or [tokens[-1]] * record.output_len
            self.histories[number].set_result(tokens + answer)
        self._show(record)
        return record

    def _show(self, record: Record) -> None:
        if record.ok:
            self.recent = [*self.recent[-31:], record]
            ttft = statistics.median(r.ttft_s for r in self.recent) * 1000
            tpots = [t for r in self.recent if (t := r.tpot_s) is not None]
            tpot = statistics.median(tpots) * 1000 if tpots else 0.0
            self.bar.set_postfix_str(f"TTFT {ttft:.0f} ms, TPOT {tpot:.1f} ms", refresh=False)
        self.bar.update()

    @staticmethod
    def _cut(task: "asyncio.Task[Record]", start: float) -> Record:
        if task.done() and not task.cancelled():
            return task.result()
        now = time.perf_counter()
        return Record(scheduled=start, sent=start, ended=now, error="cut at the time limit")
