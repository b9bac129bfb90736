"""Keeps the processes of a deployment running, and ends them in order. Driven by `deploy.up`.

Three phases, each one call: `until_ready` (a process that ends is fatal), `keep` (a process that
ends is started again, later each time), `drain` (stage by stage).
"""

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deploy.console import Console, error_in
from deploy.process import Process, State

POLL_S = 0.2
"""How often a process that starts is asked whether it is ready."""
BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A life longer than this forgets earlier failures."""
SLACK_S = 5.0
"""Beyond its own drain time, before a process that does not end is killed."""
UNREADY_S = 2.0
"""A process that is not ready holds nothing: it gets this long to end."""


class Readiness(Protocol):
    """Tells which processes do their work. Asked again until all of them do."""

    async def ready(self, starting: Sequence[Process]) -> set[str]:
        """Names of those among `starting` whose present life is ready."""
        ...


@dataclass(slots=True)
class _Restart:
    due: float
    delay_s: float


class Supervisor:
    def __init__(self, stages: Sequence[Sequence[Process]], console: Console) -> None:
        """stages: processes in the order in which they are ended, each stage as a whole."""
        self._stages = stages
        self._processes = [process for stage in stages for process in stage]
        self._console = console
        self._restarts: dict[str, _Restart] = {}

    async def start(self, process: Process, word: str) -> None:
        await process.start()
        self._console.state(process.name, word, f"pid {process.pid}")

    async def until_ready(self, readiness: Readiness, timeout_s: float) -> Process | None:
        """Wait until every process that was started is ready.

        Returns None, or the first process that ended or that is still not ready after
        `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            started = [p for p in self._processes if p.state is not State.STOPPED]
            for process in started:
                if process.state is State.EXITED:
                    return process
            await self._mark_ready(readiness)
            starting = [p for p in started if p.state is State.STARTING]
            if not starting:
                return None
            if time.monotonic() > deadline:
                return starting[0]
            await self._any_exit(POLL_S)

    async def keep(self, readiness: Readiness) -> None:
        """Start whatever ends again. Runs until it is cancelled."""
        while True:
            now = time.monotonic()
            for process in self._processes:
                if process.state is State.EXITED:
                    await self._restart(process, now)
            await self._mark_ready(readiness)
            steady = all(process.state is State.READY for process in self._processes)
            await self._any_exit(None if steady else POLL_S)

    async def drain(self, drain_s: float) -> None:
        """SIGTERM stage by stage, each given time to finish what it holds.

        May be cancelled; call `kill` afterwards in any case.
        """
        for stage in self._stages:
            alive = [process for process in stage if process.alive]
            grace_s = UNREADY_S
            for process in alive:
                if process.state is State.READY:
                    self._console.state(process.name, "draining")
                    grace_s = drain_s + SLACK_S
                process.signal(signal.SIGTERM)
            await self._ended(alive, grace_s)
            for process in alive:
                if process.alive:
                    process.signal(signal.SIGKILL)
                    await process.exited()
                    self._console.state(process.name, "killed", f"did not end in {grace_s:g} s")
                else:
                    self._report_exit(process)

    async def kill(self) -> None:
        """End what is left at once."""
        alive = [process for process in self._processes if process.alive]
        for process in alive:
            process.signal(signal.SIGKILL)
        for process in alive:
            await process.exited()
            self._console.state(process.name, "killed")

    def _report_exit(self, process: Process) -> None:
        code = process.returncode
        assert code is not None
        detail = f"code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        reason = error_in(process.tail)
        self._console.state(process.name, "exited", f"{detail}: {reason}" if reason else detail)

    async def _restart(self, process: Process, now: float) -> None:
        restart = self._restarts.get(process.name)
        if restart is None or restart.due <= process.started_at:  # not yet seen to be down
            lived = now - process.started_at
            delay = (
                BACKOFF_S
                if restart is None or lived > STEADY_S
                else min(restart.delay_s * 2, LONGEST_BACKOFF_S)
            )
            self._restarts[process.name] = _Restart(now + delay, delay)
            self._report_exit(process)
            if process.chatty:
                self._console.tail(process.name, process.tail)
            self._console.state(process.name, "waiting", f"starts again in {delay:g} s")
        elif restart.due <= now:
            await self.start(process, "starting")

    async def _mark_ready(self, readiness: Readiness) -> None:
        starting = [p for p in self._processes if p.state is State.STARTING]
        if not starting:
            return
        ready = await readiness.ready(starting)
        for process in starting:
            # It may have ended while the question was under way.
            if process.name in ready and process.state is State.STARTING:
                process.mark_ready()
                took = time.monotonic() - process.started_at
                self._console.state(process.name, "ready", f"after {took:.1f} s")

    async def _any_exit(self, timeout_s: float | None) -> None:
        waiters = {asyncio.create_task(p.exited()) for p in self._processes if p.alive}
        try:
            if waiters:
                await asyncio.wait(waiters, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            elif timeout_s is not None:
                await asyncio.sleep(timeout_s)
        finally:
            for waiter in waiters:
                waiter.cancel()

    async def _ended(self, processes: Sequence[Process], timeout_s: float) -> None:
        waiters = {asyncio.create_task(process.exited()) for process in processes}
        if waiters:
            _, late = await asyncio.wait(waiters, timeout=timeout_s)
            for waiter in late:
                waiter.cancel()
