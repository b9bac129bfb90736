"""The loop of a worker's main thread.

    take -> next_batch -> step -> settle

Called by `prefill.worker` and `decode.worker` after everything is started.
"""

from queue import Empty, SimpleQueue
from time import monotonic
from typing import Protocol

from common.engine import Engine
from common.events import Outgoing, Status


class Carrier(Protocol):
    """The I/O thread (`common.host.Host`)."""

    status: Status

    def post(self, items: list[Outgoing]) -> None: ...


def run(engine: Engine, inbox: "SimpleQueue[object]", carrier: Carrier) -> None:
    """The loop of the main thread; returns when the engine drained, blocks when it is idle.

    Each turn posts one list: the outputs of the step before and the commands of this turn.
    """
    while not engine.done:
        take_all(engine, inbox, wait=False)
        batch = engine.next_batch()
        carrier.status = engine.status(busy=bool(batch))
        items = engine.flush()
        if items:
            carrier.post(items)
        engine.metrics.show(carrier.status.load, engine.blocks.ledger())
        if batch:
            started = monotonic()
            results = engine.step(batch)
            engine.metrics.step_seconds.observe(monotonic() - started)
            engine.settle(batch, results)
        elif not engine.done:
            engine.blocks.check()
            take_all(engine, inbox, wait=True)
    carrier.post(engine.flush())


def take_all(engine: Engine, inbox: "SimpleQueue[object]", wait: bool) -> None:
    """Hand every event of the inbox to the engine; with `wait` at least one, or until the
    engine's deadline."""
    timeout = 0.0
    if wait:
        deadline = engine.deadline()
        timeout = -1.0 if deadline is None else max(0.0, deadline - monotonic())
    try:
        event = inbox.get(block=timeout != 0.0, timeout=None if timeout < 0 else timeout)
        while True:
            engine.take(event, monotonic())
            event = inbox.get_nowait()
    except Empty:
        engine.expire(monotonic())
