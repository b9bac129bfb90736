"""A worker of `benchmarks.overlap`: the parts of a real one, without Redis, and a diary.

    python -m benchmarks.overlap_worker PARENT_PID ROLE MODEL CHUNK_TOKENS KV_BLOCKS TRANSPORT

The first line of its output is its WorkerInfo, the last one, after SIGTERM, its Diary; both are
JSON. All times are of the monotonic clock, which all processes of a machine share.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue
from time import monotonic
from types import FrameType
from typing import Final

import msgspec

from common.config import WorkerConfig
from common.engine import Launched, Runner
from common.events import Drain
from common.host import Host
from common.kv.blocks import BlockManager
from common.loop import run
from common.model.batch import Row, Sampled
from common.model.worker import open_worker
from common.parent import die_with_parent
from decode.engine import DecodeEngine
from kvtransfer.endpoint import Endpoint
from kvtransfer.incoming import Landing
from kvtransfer.opening import open_endpoint
from prefill.engine import PrefillEngine

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
    exposed_ms: float = 0.0
    """Of each transfer, after the last chunk."""


class WatchedRunner:
    """A model whose steps are written down."""

    def __init__(self, runner: Runner, diary: Diary) -> None:
        self._runner = runner
        self._diary = diary

    @property
    def overlaps(self) -> bool:
        """Each step is to be watched from its begin to its end."""
        return False

    def launch(self, rows: Sequence[Row]) -> Launched:
        return self._runner.launch(rows)

    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        begin = monotonic()
        results = self._runner.step(rows)
        num_tokens = sum(len(row.tokens) for row in rows)
        self._diary.steps.append(EngineStep(begin, monotonic(), len(rows), num_tokens))
        return results

    def copy_block(self, source: int, target: int) -> None:
        self._runner.copy_block(source, target)


def watch_arrivals(endpoint: Endpoint, diary: Diary) -> None:
    """Write down which blocks land when."""
    receiver = endpoint._receiver
    landed = receiver.landed

    def watched(landing: Landing, digests: Sequence[int | None], now: float) -> None:
        before = endpoint._stats.blocks_received
        landed(landing, digests, now)
        if count := endpoint._stats.blocks_received - before:
            request = landing.transfer.key.request
            diary.arrivals.append(Arrival(monotonic(), request, count))

    receiver.landed = watched  # type: ignore[method-assign]


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
    endpoint = open_endpoint(config, info, worker.memory, inbox)
    watch_arrivals(endpoint, diary)
    blocks = BlockManager(worker.pool.num_blocks, worker.pool.generations)
    runner = WatchedRunner(worker.runner, diary)
    engine = ENGINES[role](runner, blocks, worker.limits, worker.metrics)
    host = Host(replace(config, redis=None), info, endpoint, inbox, worker.metrics)
    info = host.start()

    def drain(signum: int, frame: FrameType | None) -> None:
        inbox.put(Drain(0.0))

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ours is whoever started us to end
    print(msgspec.json.encode(info).decode(), flush=True)
    try:
        run(engine, inbox, host)
    finally:
        host.stop()
    stats = endpoint.stats()
    diary.exposed_ms = stats.exposed_s / max(1, stats.delivered) * 1e3
    print(msgspec.json.encode(diary).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
