"""The I/O thread of a worker: router links, KV transfers, registry, heartbeat, metrics over HTTP.

Everything here runs in one asyncio loop in a thread of its own. It talks to the engine thread
over two queues: `inbox` (into the engine) and `post` (out of it, one wake-up per engine turn). It
answers pings by itself, so that a long step is not taken for death. Made by `common.startup`.
"""

import asyncio
import logging
import secrets
import threading
import time
from concurrent.futures import Future
from contextlib import AsyncExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from common.config import WorkerConfig
from common.curve import CurveKeys
from common.events import (
    Announce,
    Crashed,
    Draining,
    Fence,
    Fenced,
    FromRouter,
    Outgoing,
    Publish,
    Reset,
    RouterGone,
    Send,
    Ship,
    Status,
)
from common.link import WorkerLink
from common.messages import Leaving, Ping, Pong, ToRouter, WorkerInfo
from common.metrics import WorkerMetrics
from common.monitor import Monitor
from common.redis_client import check_redis
from common.registry import Registration

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger("tandem.host")

TICKS_PER_HEARTBEAT = 4


class TransferEndpoint(Protocol):
    """`kvtransfer.endpoint.Endpoint`, which this package must not import."""

    address: str

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def failed(self) -> None:
        """Raises what ended the endpoint, if that happens."""
        ...

    def command(self, command: Any, /) -> None: ...

    def set_progress(self, steps: int, step_s: float) -> None: ...

    def reset(self, epoch: int) -> None: ...

    def stats(self) -> "DataclassInstance": ...


def new_epoch() -> int:
    """A name for one life of a worker: random, 63 bits."""
    return secrets.randbits(63)


class Host:
    """The I/O thread. `start`, `post` and `stop` are called by the engine thread."""

    def __init__(
        self,
        config: WorkerConfig,
        info: WorkerInfo,
        endpoint: TransferEndpoint,
        inbox: "SimpleQueue[object]",
        metrics: WorkerMetrics,
    ) -> None:
        """`info` lacks the addresses, which are known once the sockets are bound. Without a
        `config.redis` the worker is in no directory: whoever started it knows it."""
        self.status = Status()
        """Written by the engine thread: one reference, always a whole Status."""
        self._config = config
        self._redis = config.redis
        self._info = info
        self._endpoint = endpoint
        self._inbox = inbox
        self._monitor = Monitor(metrics, endpoint)
        self._registration: Registration | None = None
        self._routers: set[bytes] = set()
        self._ticked_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._is_over = False
        self._failure: asyncio.Future[None] | None = None
        self._ready: Future[WorkerInfo] = Future()
        self._thread = threading.Thread(target=self._main, name="io", daemon=True)

    # ------------------------------------------------------------ the engine thread

    def start(self) -> WorkerInfo:
        """Bind everything and register; returns the complete description of this worker.

        Raises ConfigError if an address cannot be bound or Redis does not answer.
        """
        self._thread.start()
        return self._ready.result()

    def post(self, items: list[Outgoing]) -> None:
        """Have the I/O thread carry these out, in order."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, items)

    def stop(self) -> None:
        """Say goodbye to routers and registry, close everything, end the thread."""
        self._is_over = True  # should the loop not be there yet
        if self._loop is not None and self._stopping is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    # ------------------------------------------------------------ the I/O thread

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                self._inbox.put(Crashed(error))
            else:
                self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._is_over:
            self._stopping.set()
        self._failure = self._loop.create_future()
        self._loop.set_exception_handler(self._crash)
        if self._redis is not None:
            await check_redis(self._redis)
        async with AsyncExitStack() as closing:
            keys = CurveKeys.load(self._config)
            self._link = WorkerLink(self._config.worker_host, self._config, keys)
            closing.push_async_callback(self._link.close)
            await self._link.start()
            await self._endpoint.start()
            closing.push_async_callback(self._endpoint.close)
            await self._monitor.start(self._config.worker_host)
            closing.push_async_callback(self._monitor.close)
            self._info = replace(
                self._info,
                address=self._link.address,
                kv_address=self._endpoint.address,
                metrics_url=f"{self._monitor.url}/metrics",
                curve_key="" if keys is None else keys.public.decode(),
            )
            self._link.set_info(self._info)
            self._ticked_at = time.monotonic()
            running = [self._read_routers(), self._tick(), self._endpoint.failed(), self._failure]
            if self._redis is not None:
                config = self._config
                self._registration = Registration(
                    self._redis, config.namespace, config.registry_ttl_s, self._info
                )
                running.append(self._registration.run())
            loops: list[asyncio.Future[Any]] = [asyncio.ensure_future(loop) for loop in running]
            self._ready.set_result(self._info)
            try:
                await self._until_stopped(loops)
                self._tell_routers(Leaving(done=True))
                if self._registration is not None:
                    await self._registration.leave()
            finally:
                for task in loops:
                    task.cancel()
                await asyncio.gather(*loops, return_exceptions=True)

    async def _until_stopped(self, loops: "list[asyncio.Future[Any]]") -> None:
        """Raises what ended one of `loops`; none of them returns before the worker leaves."""
        assert self._stopping is not None
        stopping: asyncio.Future[Any] = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait([stopping, *loops], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        for task in loops:
            if task.done():
                task.result()
                raise AssertionError("a loop of the I/O thread returned")

    def _crash(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception in a callback of the loop ends the worker, like one in a task."""
        error = context.get("exception") or AssertionError(context["message"])
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _read_routers(self) -> None:
        while True:
            router, message = await self._link.receive()
            self._watch_pause()
            self._routers.add(router)
            if isinstance(message, Ping):
                self._link.send(router, self._pong(message.seq))
            else:
                self._inbox.put(FromRouter(router, message, time.monotonic()))

    def _pong(self, seq: int) -> Pong:
        status = self.status
        return Pong(
            seq=seq,
            epoch=self._info.epoch,
            steps=status.steps,
            load=status.load,
            busy=status.busy,
            state=status.state,
            costs=status.costs,
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s / TICKS_PER_HEARTBEAT)
            self._watch_pause()
            self._ticked_at = now = time.monotonic()
            for router in self._link.silent(now, self._config.router_silence_s):
                log.info("router %s is gone", router.hex())
                self._routers.discard(router)
                self._inbox.put(RouterGone(router))
            self._show_progress()

    def _watch_pause(self) -> None:
        """Begin a new life if this thread slept past the lease: peers and routers have given up
        what this worker held. Asked before any message is handed to the engine."""
        late_s = time.monotonic() - self._ticked_at
        if late_s <= self._config.lease_s + self._config.heartbeat_s:
            return
        log.warning("paused for %.1f s, past the lease: starting over with a new epoch", late_s)
        self._ticked_at = time.monotonic()
        self._info = replace(self._info, epoch=new_epoch())
        self._link.set_info(self._info)
        # First the engine's own attempts, then what comes back from the transfers.
        self._inbox.put(Reset())
        self._endpoint.reset(self._info.epoch)

    def _dispatch(self, items: list[Outgoing]) -> None:
        for item in items:
            match item:
                case Send(router, message):
                    self._link.send(router, message)
                case Ship(command):
                    self._endpoint.command(command)
                case Fence(attempt):
                    self._inbox.put(Fenced(attempt))
                case Publish(stored, evicted) if self._registration is not None:
                    self._registration.publish(stored, evicted)
                case Announce(hashes) if self._registration is not None:
                    self._registration.replace(self._info, hashes)
                case Draining():
                    self._info = replace(self._info, state="draining")
                    self._link.set_info(self._info)
                    self._monitor.state = "draining"
                    if self._registration is not None:
                        self._registration.set_state("draining")
                    self._tell_routers(Leaving(done=False))
        self._show_progress()

    def _show_progress(self) -> None:
        status = self.status
        self._endpoint.set_progress(status.steps, status.step_s)

    def _tell_routers(self, message: ToRouter) -> None:
        for router in self._routers:
            self._link.send(router, message)
