"""The prefill worker process: `main` puts its parts together. Called by `deploy.cli`."""

from queue import SimpleQueue

from common import log
from common.config import WorkerConfig
from common.kv.blocks import BlockManager
from common.model.worker import open_worker
from common.startup import quit_on_signals, serve, worker_name
from kvtransfer.opening import open_endpoint
from prefill.engine import PrefillEngine


def main(config: WorkerConfig) -> int:
    """Serve until drained; returns the exit code. Raises ConfigError."""
    quit_on_signals()
    name = worker_name(config, "prefill")
    log.setup(config, "prefill", name)
    worker = open_worker(config, "prefill", name)
    info = worker.info
    inbox: SimpleQueue[object] = SimpleQueue()
    endpoint = open_endpoint(config, info, worker.memory, inbox)
    blocks = BlockManager(worker.pool.num_blocks, worker.pool.generations)
    engine = PrefillEngine(worker.runner, blocks, worker.limits, worker.metrics)
    return serve(config, info, engine, endpoint, inbox)
