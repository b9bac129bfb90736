"""From parts to a running worker, and from a signal to its end.

`serve` starts the I/O thread, runs the engine loop until the worker has drained, and ends
everything. Called by `prefill.worker` and `decode.worker`, in the main thread.
"""

import logging
import secrets
import signal
from queue import SimpleQueue
from types import FrameType

from common.config import WorkerConfig
from common.engine import Engine
from common.events import Drain
from common.host import Host, TransferEndpoint
from common.loop import run
from common.messages import WorkerInfo

log = logging.getLogger("tandem.worker")


def quit_on_signals() -> None:
    """Until `serve` is reached there is nothing to finish: SIGTERM and SIGINT just end us."""

    def quit(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, quit)
    signal.signal(signal.SIGINT, quit)


def worker_name(config: WorkerConfig, role: str) -> str:
    return config.worker_id or f"{role}-{secrets.token_hex(4)}"


def serve(
    config: WorkerConfig,
    info: WorkerInfo,
    engine: Engine,
    endpoint: TransferEndpoint,
    inbox: "SimpleQueue[object]",
) -> int:
    """Run until drained after SIGTERM or SIGINT; returns the exit code. `info` lacks addresses.

    Raises ConfigError if the worker cannot start, and whatever breaks it later.
    """
    host = Host(config, info, endpoint, inbox, engine.metrics)
    try:
        info = host.start()

        def drain(signum: int, frame: FrameType | None) -> None:
            inbox.put(Drain(config.drain_s))  # safe here: SimpleQueue.put is reentrant

        signal.signal(signal.SIGTERM, drain)
        signal.signal(signal.SIGINT, drain)
        log.info(
            "ready: %s worker %s, model %s (%s), %d blocks of %d tokens, %s",
            info.role,
            info.id,
            info.model,
            info.layout.dtype,
            info.num_blocks,
            info.layout.block_size,
            info.address,
        )
        run(engine, inbox, host)
        log.info("drained")
    finally:
        host.stop()
    return 0
