"""The router's side of the deployment: which workers there are, and what they say.

Follows the registry and the links, keeps the fleet, and passes outputs to the dispatcher. The HTTP
side calls `limits`, `submit`, `cancel` and `ledgers`, and reads each request's `events`.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from common.link import Down, Message, RouterLink, Up
from common.messages import (
    Failed,
    Inspected,
    Leaving,
    Ledger,
    Pong,
    Step,
    ToRouter,
    WorkerInfo,
)
from router.directory import Directory
from router.dispatch import BOUNDS, NO_LIMITS, Dispatcher, Patience
from router.errors import unavailable
from router.explain import Explainer
from router.fleet import Fleet, Limits, Member
from router.inflight import Inflight
from router.inspection import Inspector
from router.membership import Membership
from router.metrics import RouterMetrics
from router.request import Request
from router.slo import Slo
from router.waiting import Bounds

log = logging.getLogger(__name__)


class Service:
    def __init__(
        self,
        *,
        membership: Membership,
        directory: Directory,
        link: RouterLink,
        metrics: RouterMetrics,
        patience: Patience,
        explainer: Explainer,
        step_s: float | None = None,
        slo: Slo = NO_LIMITS,
        bounds: Bounds = BOUNDS,
        share: Callable[[Fleet], Inflight],
        max_model_len: int = 0,
        hang_s: float = 30.0,
    ) -> None:
        """`step_s`, `slo`, `bounds`: see `Dispatcher`; `max_model_len`, `hang_s`: see `Fleet`."""
        self.fleet = Fleet(max_model_len, hang_s)
        self.explainer = explainer
        self.draining = False
        """Set once, on shutdown: nothing new is accepted."""
        self._membership = membership
        self._directory = directory
        self._link = link
        self._metrics = metrics
        self._grace_s = patience.grace_s
        self._dispatcher = Dispatcher(
            directory, link, self.fleet, metrics, patience, explainer, step_s, slo, bounds
        )
        self._inspector = Inspector()
        self._inflight = share(self.fleet)
        self._came = asyncio.Event()
        """A worker came up."""

    async def run(self) -> None:
        """Runs until cancelled; an exception in it is a bug and ends the process."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._directory.run())
            tasks.create_task(self._follow())
            tasks.create_task(self._receive())
            tasks.create_task(self._inflight.run())
            tasks.create_task(self._follow_load())

    def unavailable(self) -> str | None:
        """None if a request can be served, else why not."""
        return "the router is shutting down" if self.draining else self.fleet.why_not()

    async def limits(self) -> Limits:
        """What a request may ask for; waits a little for a first worker. Raises RequestError."""
        if self.draining:
            raise unavailable("The router is shutting down.")
        try:
            async with asyncio.timeout(self._grace_s):
                while self.fleet.limits is None:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise unavailable("No worker is ready to serve requests.") from None
        return self.fleet.limits

    def submit(self, request: Request) -> None:
        self._dispatcher.submit(request)

    def cancel(self, request: Request) -> None:
        self._dispatcher.cancel(request)

    @property
    def num_live(self) -> int:
        """Prompts that are being served."""
        return self._dispatcher.num_live

    def num_requests(self) -> tuple[int, int]:
        """(running, waiting) of the whole deployment, and what waits here for a worker."""
        running, waiting = self.fleet.num_requests()
        return running, waiting + self._dispatcher.num_waiting

    async def idle(self) -> None:
        """Returns when no request is live."""
        await self._dispatcher.idle()

    def shut_down(self) -> None:
        """End what is still live with an error."""
        self._dispatcher.fail_all(unavailable("The router is shutting down."))

    async def ledgers(self, timeout_s: float) -> dict[str, Ledger | None]:
        """The ledger of each worker that is live; None for one that did not answer in time."""
        return await self._inspector.ask([m.info.id for m in self.fleet], self._link, timeout_s)

    async def _follow(self) -> None:
        """Keep a link to every worker that the registry shows and that serves our model."""
        connected: set[str] = set()
        while True:
            workers = self._directory.workers.values()
            listed = {info.id: info for info in workers if self._membership.admits(info)}
            for info in listed.values():
                self._link.connect(info)
            # Redis says who exists, the link who lives: a live worker keeps its link.
            gone = {id for id in connected if id not in listed and id not in self.fleet}
            for worker in gone:
                self._link.disconnect(worker)
            connected = (connected | listed.keys()) - gone
            await self._directory.changed()

    async def _follow_load(self) -> None:
        """What other routers have ended may be room for who waits here: no worker tells of it."""
        while True:
            await self._inflight.heard()
            self._dispatcher.serve_waiting()

    async def _receive(self) -> None:
        while True:
            match await self._link.receive():
                case Up(info):
                    self._up(info)
                case Down(worker, reason):
                    self._down(worker, reason)
                case Message(worker, message):
                    self._handle(worker, message)

    def _up(self, info: WorkerInfo) -> None:
        if not self._membership.admits(info):
            self._link.disconnect(info.id)
            return
        log.info("worker %s (%s) is up, epoch %d", info.id, info.role, info.epoch)
        self.fleet.up(info)
        self._count_workers()
        self._came.set()
        self._dispatcher.retry_waiting()

    def _down(self, worker: str, reason: str) -> None:
        if worker not in self.fleet:
            return
        drained = self.fleet[worker].draining
        level = logging.INFO if drained else logging.WARNING
        log.log(level, "worker %s is down: %s", worker, reason)
        self.fleet.down(worker)
        self._directory.forget(worker)
        self._count_workers()
        self._inspector.lost(worker)
        self._dispatcher.lost(worker, "draining" if drained else "lost")
        if worker not in self._directory.workers:
            self._link.disconnect(worker)

    def _take_pong(self, member: Member, pong: Pong) -> None:
        member.report(pong.load)
        member.meter.told(pong.costs)
        if pong.state != "ready":
            self._dispatcher.leaving(member.info.id)
        self.fleet.review()
        was_hung = member.progress.hung
        member.progress.report(pong.steps, pong.busy, time.monotonic())
        worker = member.info.id
        if member.progress.hung and not was_hung:
            log.error("worker %s hangs: it has work and makes no steps", worker)
            self._dispatcher.lost(worker, "hung")
        elif was_hung and not member.progress.hung:
            log.warning("worker %s goes on", worker)
            self._dispatcher.retry_waiting()

    def _count_workers(self) -> None:
        for role in ("prefill", "decode"):
            count = sum(member.info.role == role for member in self.fleet)
            self._metrics.workers.labels(role).set(count)

    def _handle(self, worker: str, message: ToRouter) -> None:
        member = self.fleet.get(worker)
        if member is None:
            return
        match message:
            case Step(outputs, load):
                member.report(load)
                if member.info.role == "decode":
                    follows = bool(member.streams)
                    member.meter.stepped(load, time.monotonic(), follows=follows)
                for output in outputs:
                    self._dispatcher.take(worker, output)
                self._dispatcher.serve_waiting()
            case Pong():
                self._take_pong(member, message)
                self._dispatcher.serve_waiting()
            case Failed():
                self._dispatcher.failed(worker, message)
            case Inspected():
                self._inspector.answered(worker, message)
            case Leaving():
                self._dispatcher.leaving(worker)
