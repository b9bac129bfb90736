"""The transfer endpoint of a worker process, from its configuration. Called by the `main` of both
roles."""

from common.config import WorkerConfig
from common.curve import CurveKeys
from common.messages import WorkerInfo
from kvtransfer.endpoint import Endpoint, Inbox
from kvtransfer.identity import EndpointIdentity
from kvtransfer.memory import BlockMemory


def open_endpoint(
    config: WorkerConfig, info: WorkerInfo, memory: BlockMemory, inbox: Inbox
) -> Endpoint:
    """Not started yet. `info` needs no addresses. Raises ConfigError for a transport that cannot
    be used here, or keys that cannot be read."""
    identity = EndpointIdentity(info.id, info.epoch, info.content_id, info.layout)
    keys = CurveKeys.load(config)
    return Endpoint(identity, memory, inbox, config, config.worker_host, config.transport, keys)
