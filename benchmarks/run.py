"""Runs queries against a server: open loop (arrival times) or closed loop (concurrency)."""

import asyncio
import collections
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from tqdm import tqdm

from benchmarks.client import Record, Target, connect, send
from benchmarks.datasets import Query

AHEAD_S = 0.2
"""An open-loop request is drawn and encoded this long before it is due."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Queries and when each is due (seconds from the start of the run).

    A due time of minus infinity is a closed loop: the request is due when its turn comes.
    """

    queries: Sequence[Query]
    due: Sequence[float]
    max_concurrency: int = 0
    """Requests in flight at most; 0: no limit. A request over the limit is sent late."""
    max_seconds: float = 0.0
    """The run is cut after this time: what is unfinished is an error, what was not yet due is left
    out. 0: no limit."""
    warmups: Sequence[Query] = ()
    """Sent before the run and not measured: prompts of their own, which warm no cache."""


@dataclass(frozen=True, slots=True)
class Run:
    records: list[Record]
    """In the order of the queries."""
    cpu_share: float
    """CPU seconds of this process per second of the run."""
    not_due: int = 0
    """Queries left out since the run was cut before they were due."""
    answers_unknown: bool = False
    """Conversations continued made-up answers: the server returns no token ids."""


async def run(target: Target, plan: Plan, *, progress: bool = True) -> Run:
    """Send the plan and wait for all answers.

    Conversation turns wait for the turn that they follow. Raises ConnectionError if a warm-up
    fails.
    """
    async with connect() as session:
        if plan.warmups:
            warm = Plan(plan.warmups, [-math.inf] * len(plan.warmups), plan.max_concurrency or 1)
            for record in (await _Runner(session, target, warm, False).run()).records:
                if not record.ok:
                    raise ConnectionError(f"warm-up request failed: {record.error}")
        return await _Runner(session, target, plan, progress).run()


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
        self.records: list[Record | None] = [None] * len(plan.queries)
        self.histories: dict[int, asyncio.Future[list[int]]] = {}
        self.recent: collections.deque[Record] = collections.deque(maxlen=32)
        self.answers_unknown = False

    async def run(self) -> Run:
        loop = asyncio.get_running_loop()
        self.histories = {
            q.follows: loop.create_future() for q in self.plan.queries if q.follows is not None
        }
        # The head start is for the requests that are due at once.
        cpu, start = time.process_time(), time.perf_counter() + AHEAD_S
        try:
            async with asyncio.timeout(self.plan.max_seconds or None), asyncio.TaskGroup() as tasks:
                for number in range(len(self.plan.queries)):
                    tasks.create_task(self._one(number, start))
        except TimeoutError:
            self._cut()
        finally:
            self.bar.close()
        elapsed = time.perf_counter() - start + AHEAD_S
        records = [record for record in self.records if record is not None]
        return Run(
            records,
            (time.process_time() - cpu) / elapsed,
            len(self.records) - len(records),
            self.answers_unknown,
        )

    async def _one(self, number: int, start: float) -> None:
        query = self.plan.queries[number]
        due = start + self.plan.due[number]
        history: list[int] = []
        if query.follows is not None:
            history = await self.histories[query.follows]
            del self.histories[query.follows]
            due = max(due, time.perf_counter())
        closed = self.plan.due[number] == -math.inf
        tokens: list[int] | None = None
        if not closed and not self.plan.max_concurrency:
            await _until(due - AHEAD_S)
            tokens = history + query.tokens()
            body = self.target.body(tokens, query.output_len)
        await _until(due)
        record = Record(due=due)
        if not closed:
            self.records[number] = record
        was_full = self.limit.locked()
        async with self.limit:
            if closed:
                record.due = record.released = time.perf_counter()
                self.records[number] = record
            else:
                record.released = time.perf_counter() if was_full else due
            if tokens is None:
                tokens = history + query.tokens()
                body = self.target.body(tokens, query.output_len)
            record.input_len = len(tokens)
            await send(self.session, self.target, body, record)
        if number in self.histories:
            if record.ok and not record.token_ids:
                self.answers_unknown = True
            answer = record.token_ids or [tokens[-1]] * record.output_len
            self.histories[number].set_result(tokens + answer)
        record.token_ids = []
        self._show(record)

    def _show(self, record: Record) -> None:
        if record.ok:
            self.recent.append(record)
            ttft = statistics.median(r.ttft_s for r in self.recent) * 1000
            tpots = [t for r in self.recent if (t := r.tpot_s) is not None]
            tpot = statistics.median(tpots) * 1000 if tpots else 0.0
            self.bar.set_postfix_str(f"TTFT {ttft:.0f} ms, TPOT {tpot:.1f} ms", refresh=False)
        self.bar.update()

    def _cut(self) -> None:
        """Note what did not end in time."""
        now = time.perf_counter()
        for record in self.records:
            if record is not None and not record.ended:
                record.released = record.released or now
                record.sent = record.sent or now
                record.ended = now
                record.error = "cut at the time limit"


async def _until(moment: float) -> None:
    """Return at once for a moment that has passed."""
    if (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left)
