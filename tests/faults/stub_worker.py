"""A whole worker with a stub for a model: real engine, I/O thread, links, transfers and registry.

Tokens are a function of (seed, position), and the KV of a token is a digest of all tokens up to
it, which the stub checks whenever it draws one (`tests.stub`): a block that is wrong, stale or of
another request ends the worker with an AssertionError.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import FrameType

import msgspec

from common import log
from common.config import WorkerConfig
from common.events import Drain
from common.host import Host, new_epoch
from common.kv.blocks import BlockManager
from common.kv.layout import KvLayout
from common.loop import run as run_engine
from common.messages import KvLayoutInfo, WorkerInfo
from common.metrics import WorkerMetrics
from common.model.batch import Row, Sampled
from decode.engine import DecodeEngine
from kvtransfer.identity import EndpointIdentity
from prefill.engine import PrefillEngine
from tests.faults.faulty_endpoint import FaultyEndpoint
from tests.faults.spec import Armed, Born, Dying, Report, Spec
from tests.faults.sudden_death import SuddenDeath
from tests.stub import EOS, VOCAB, SharedStubPool, StubPool, StubRunner, stub_limits


class SlowRunner(StubRunner):
    """A step takes a while, as it would with a model."""

    def __init__(self, pool: StubPool, step_s: float) -> None:
        super().__init__(pool)
        self._step_s = step_s

    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        self.batches.clear()
        time.sleep(self._step_s)
        return super().step(rows)


def say(report: Report) -> None:
    """One line to whoever reads the nursery; lines of many processes do not mix."""
    os.write(1, msgspec.json.encode(report) + b"\n")


def run(spec: Spec) -> int:
    """Serve until SIGTERM has drained the worker; returns its exit code."""
    timers = spec.timers
    config = WorkerConfig(
        redis=spec.redis,
        worker_id=spec.name,
        transport=spec.transport,
        log_level="error",
        heartbeat_s=timers.heartbeat_s,
        dead_after=timers.dead_after,
        lease_s=timers.lease_s,
        stall_s=timers.stall_s,
        drain_s=timers.drain_s,
    )
    faulthandler.enable()
    log.setup(config, spec.role, spec.name)
    layout = KvLayout(
        num_layers=spec.num_layers,
        num_kv_heads=1,
        head_dim=4,
        block_size=spec.block_size,
        dtype="float32",
    )
    info = describe(spec)
    pool = SharedStubPool(spec.num_blocks, layout)
    inbox: SimpleQueue[object] = SimpleQueue()
    identity = EndpointIdentity(info.id, info.epoch, info.content_id, info.layout)
    endpoint = FaultyEndpoint(spec, identity, pool, inbox, config)
    assert pool.shared is not None
    blocks = BlockManager(spec.num_blocks, pool.shared.generations)
    limits = stub_limits(
        spec.num_blocks,
        block_size=spec.block_size,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        content_id=spec.content_id,
    )
    kind = PrefillEngine if spec.role == "prefill" else DecodeEngine
    engine = kind(SlowRunner(pool, spec.step_s), blocks, limits, WorkerMetrics(spec.role))
    if spec.die_at:
        death = SuddenDeath(spec.die_at, spec.die_after, lambda step: say(Dying(spec.name, step)))
        death.watch(endpoint, engine.runner)

        def arm() -> None:
            death.arm()
            say(Armed(spec.name))

        obey(signal.SIGUSR1, arm)
    if spec.network:
        obey(signal.SIGUSR2, lambda: endpoint.loop.call_soon_threadsafe(endpoint.toggle))
    host = Host(config, info, endpoint, inbox, engine.metrics)

    def drain(number: int, frame: FrameType | None) -> None:
        inbox.put(Drain(config.drain_s))

    try:
        info = host.start()
        signal.signal(signal.SIGTERM, drain)
        say(Born(spec.name, info))
        run_engine(engine, inbox, host)
    finally:
        host.stop()
    return 0


def obey(number: signal.Signals, do: Callable[[], object]) -> None:
    """Call `do` upon every signal of this number, at once: a handler would wait until the engine's
    thread wakes up. To be called before other threads are started, which inherit the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def wait() -> None:
        while True:
            signal.sigwait({number})
            do()

    Thread(target=wait, name=number.name, daemon=True).start()


def describe(spec: Spec) -> WorkerInfo:
    """Without the addresses."""
    return WorkerInfo(
        id=spec.name,
        epoch=new_epoch(),
        role=spec.role,
        pid=os.getpid(),
        address="",
        kv_address="",
        metrics_url="",
        model="stub",
        content_id=spec.content_id,
        text_id="stub",
        layout=KvLayoutInfo(
            block_size=spec.block_size,
            num_layers=spec.num_layers,
            num_kv_heads=1,
            head_dim=4,
            dtype="float32",
        ),
        vocab_size=VOCAB,
        max_model_len=4096,
        num_blocks=spec.num_blocks,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        eos_token_ids=(EOS,),
    )


def holdings(pid: int) -> tuple[int, int]:
    """Open descriptors of a process, and mapped KV pools."""
    process = Path(f"/proc/{pid}")
    maps = (process / "maps").read_text()
    return len(os.listdir(process / "fd")), maps.count("memfd:tandem-kv")
