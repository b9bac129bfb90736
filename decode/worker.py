"""The decode worker process: `main` puts its parts together. Called by `deploy.cli`."""

from queue import SimpleQueue

from common import log
from common.config import WorkerConfig
from common.kv.blocks import BlockManager
from common.model.worker import open_worker
from common.startup import quit_on_signals, serve, worker_name
from decode.engine import DecodeEngine
from kvtransfer.opening import open_endpoint


def main(config: WorkerConfig) -> int:
    """Serve until drained; returns the exit code. Raises ConfigError."""
    quit_on_signals()
    name = worker_name(config, "decode")
    log.setup(config, "decode", name)
    worker = open_worker(config, "decode", name)
    info = worker.info
    inbox: SimpleQueue[object] = SimpleQueue()
    endpoint = open_endpoint(config, info, worker.memory, inbox)
    blocks = BlockManager(worker.pool.num_blocks, worker.pool.generations)
    engine = DecodeEngine(worker.runner, blocks, worker.limits, worker.metrics)
    return serve(config, info, engine, endpoint, inbox)
