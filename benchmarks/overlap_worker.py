"""A worker of `benchmarks.overlap`: the parts of a real one, without Redis, and a diary.

    python -m benchmarks.overlap_worker PARENT_PID ROLE MODEL CHUNK_TOKENS KV_BLOCKS TRANSPORT

The first line of its output is its WorkerInfo, the last one, after SIGTERM, its Diary; both are
JSON. All times are of the monotonic clock, which all processes of a machine share.
"""

import asyncio
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from random import SystemRandom
from time import monotonic
from types import FrameType
from typing import Any, Final

import msgspec

from common.config import WorkerConfig
from common.engine import Runner
from common.events import Crashed, Drain, Fence, Fenced, FromRouter, Outgoing, Send, Ship, Status
from common.kv.blocks import BlockManager
from common.link import WorkerLink
from common.loop import run
from common.messages import Ping, Pong, WorkerInfo
from common.model.batch import Row, Sampled
from common.model.worker import open_worker
from common.parent import die_with_parent
from decode.engine import DecodeEngine
from kvtransfer.endpoint import Endpoint, Inbox
from kvtransfer.identity import EndpointIdentity
from kvtransfer.incoming import Landing
from kvtransfer.intake import Intake
from kvtransfer.memory import BlockMemory
from kvtransfer.receiver import Receiver
from prefill.engine import PrefillEngine

PROGRESS_S: Final = 0.25
"""Between two words to the receivers about how far the engine is."""
ENGINES: Final = {"prefill": PrefillEngine, "decode": DecodeEngine}


class EngineStep(msgspec.Struct, frozen=True, array_like=True):
    begin: float
    end: float
    num_rows: int
    num_tokens: int


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one prompt that landed here at once."""

    at: float
    request: int
    num_blocks: int


class Diary(msgspec.Struct):
    steps: list[EngineStep] = msgspec.field(default_factory=list)
    arrivals: list[Arrival] = msgspec.field(default_factory=list)


class WatchedRunner:
    """A model whose steps are written down."""

    def __init__(self, runner: Runner, diary: Diary) -> None:
        self._runner = runner
        self._diary = diary

    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        begin = monotonic()
        results = self._runner.step(rows)
        num_tokens = sum(len(row.tokens) for row in rows)
        self._diary.steps.append(EngineStep(begin, monotonic(), len(rows), num_tokens))
        return results

    def copy_block(self, source: int, target: int) -> None:
        self._runner.copy_block(source, target)


class WatchedReceiver(Receiver):
    """Writes down which blocks landed when."""

    diary: Diary

    def landed(self, landing: Landing, digests: Sequence[int | None], now: float) -> None:
        before = self._stats.blocks_received
        super().landed(landing, digests, now)
        if count := self._stats.blocks_received - before:
            request = landing.transfer.key.request
            self.diary.arrivals.append(Arrival(monotonic(), request, count))


class WatchedEndpoint(Endpoint):
    def __init__(
        self,
        identity: EndpointIdentity,
        memory: BlockMemory,
        inbox: Inbox,
        config: WorkerConfig,
        diary: Diary,
    ) -> None:
        super().__init__(identity, memory, inbox, config, config.worker_host, config.transport)
        random = SystemRandom()
        receiver = WatchedReceiver(identity, memory.block_bytes, self._timers, self._stats, random)
        receiver.diary = diary
        self._receiver = receiver
        self._intake = Intake(receiver, memory, self._stats)


class Io:
    """The I/O thread: what `common.host` does, but for registry and metrics."""

    def __init__(
        self,
        config: WorkerConfig,
        info: WorkerInfo,
        endpoint: Endpoint,
        inbox: "SimpleQueue[object]",
    ) -> None:
        self.status = Status()
        self._config = config
        self._info = info
        self._endpoint = endpoint
        self._inbox = inbox
        self._ready: Future[tuple[WorkerInfo, asyncio.AbstractEventLoop]] = Future()
        self._thread = threading.Thread(target=self._main, name="io", daemon=True)

    def start(self) -> WorkerInfo:
        """Returns the complete description of this worker. Raises ConfigError."""
        self._thread.start()
        info, self._loop = self._ready.result()
        return info

    def post(self, items: list[Outgoing]) -> None:
        self._loop.call_soon_threadsafe(self._dispatch, items)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

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
        self._link = WorkerLink(self._config.worker_host, self._config)
        await self._link.start()
        await self._endpoint.start()
        info = msgspec.structs.replace(
            self._info, address=self._link.address, kv_address=self._endpoint.address
        )
        self._link.set_info(info)
        loops = (self._read_routers(), self._tick(), self._endpoint.failed())
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(loop) for loop in loops]
        stopping: asyncio.Future[Any] = asyncio.ensure_future(self._stopping.wait())
        self._ready.set_result((info, asyncio.get_running_loop()))
        try:
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            await self._endpoint.close()
            await self._link.close()

    async def _read_routers(self) -> None:
        while True:
            router, message = await self._link.receive()
            if not isinstance(message, Ping):
                self._inbox.put(FromRouter(router, message, monotonic()))
                continue
            status = self.status
            pong = Pong(
                seq=message.seq,
                epoch=self._info.epoch,
                steps=status.steps,
                load=status.load,
                busy=status.busy,
                state=status.state,
                costs=status.costs,
            )
            self._link.send(router, pong)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            self._show_progress()

    def _dispatch(self, items: list[Outgoing]) -> None:
        for item in items:
            match item:
                case Send(router, message):
                    self._link.send(router, message)
                case Ship(command):
                    self._endpoint.command(command)
                case Fence(attempt):
                    self._inbox.put(Fenced(attempt))
        self._show_progress()

    def _show_progress(self) -> None:
        self._endpoint.set_progress(self.status.steps, self.status.step_s)


def main(arguments: Sequence[str]) -> None:
    parent_pid, role, model, chunk_tokens, kv_blocks, transport = arguments
    die_with_parent(int(parent_pid))
    config = WorkerConfig(
        model=model,
        redis="redis://nobody",  # no registry: who starts us reads our first line
        device="cpu",
        threads=1,
        max_num_batched_tokens=int(chunk_tokens),
        kv_blocks=int(kv_blocks),
        transport=transport,
    )
    worker = open_worker(config, role, role)
    worker.pool.tensor.zero_()  # all pages are there, as in a worker of some age
    info, diary = worker.info, Diary()
    inbox: SimpleQueue[object] = SimpleQueue()
    identity = EndpointIdentity(info.id, info.epoch, info.content_id, info.layout)
    endpoint = WatchedEndpoint(identity, worker.pool, inbox, config, diary)
    blocks = BlockManager(worker.pool.num_blocks, worker.pool.generations)
    runner = WatchedRunner(worker.runner, diary)
    engine = ENGINES[role](runner, blocks, worker.limits, worker.metrics)
    io = Io(config, info, endpoint, inbox)
    info = io.start()

    def drain(signum: int, frame: FrameType | None) -> None:
        inbox.put(Drain(0.0))

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ours is whoever started us to end
    print(msgspec.json.encode(info).decode(), flush=True)
    try:
        run(engine, inbox, io)
    finally:
        io.stop()
    print(msgspec.json.encode(diary).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
