"""The loop of a worker's main thread.

    take -> next_batch -> step -> settle

On a device of its own (`Runner.overlaps`) a step only has to be begun before the rest of the turn
is done: what the last one brought is sent, and events are taken that cannot touch the step.

Called by `prefill.worker` and `decode.worker` after everything is started.
"""

from dataclasses import replace
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Protocol

from common.engine import Engine
from common.events import Outgoing, Status
from common.step_meter import StepMeter


class Carrier(Protocol):
    """The I/O thread (`common.host.Host`)."""

    status: Status

    def post(self, items: list[Outgoing]) -> None: ...


LONGER = 2.0
"""A step may take so many times as long as the longest of late."""
FORGET = 0.98
"""Of the time of the longest step, what is left after another one."""
QUIET_S = 1.0
"""Idle for this long, a worker checks its books; the check takes time on a large pool.

It never sleeps for longer: the handler of a signal that came right before it fell asleep, or to
another thread, runs only when this thread wakes up."""


def run(engine: Engine, inbox: "SimpleQueue[object]", carrier: Carrier) -> None:
    """Returns when the engine has drained; blocks while there is nothing to do.

    Each turn posts one list: the outputs of the step before and the commands of this turn.
    """
    checked = True
    longest_s = 0.0
    meter = StepMeter()
    while True:
        take_all(engine, inbox, timeout=0.0)
        if engine.done:
            break
        batch = engine.next_batch()
        overlaps = bool(batch) and engine.runner.overlaps
        started = monotonic()
        launched = engine.launch(batch) if overlaps else None
        status = engine.status(busy=bool(batch))
        carrier.status = replace(status, step_s=LONGER * longest_s, costs=meter.costs)
        items = engine.flush()
        if items:
            carrier.post(items)
        engine.metrics.show(carrier.status.load, engine.blocks.ledger())
        if batch:
            checked = False
            held: list[object] = []
            if launched is not None:
                held = take_harmless(engine, inbox)
                results = engine.collect(launched)
            else:
                started = monotonic()
                results = engine.step(batch)
            engine.now = monotonic()
            took_s = engine.now - started
            longest_s = max(took_s, FORGET * longest_s)
            engine.metrics.step_seconds.observe(took_s)
            meter.saw(batch, took_s)
            engine.settle(batch, results)
            for event in held:
                engine.take(event, monotonic())
            continue
        deadline = engine.deadline()
        wait_s = QUIET_S if deadline is None else min(QUIET_S, max(0.0, deadline - monotonic()))
        if not take_all(engine, inbox, wait_s) and not checked:
            engine.blocks.check()
            checked = True
    carrier.status = engine.status(busy=False)
    carrier.post(engine.flush())


def take_all(engine: Engine, inbox: "SimpleQueue[object]", timeout: float) -> bool:
    """Hand every event of the inbox to the engine, after waiting for the first one at most
    `timeout` seconds. False if none came."""
    taken = False
    try:
        event = inbox.get(timeout != 0.0, timeout)
        while True:
            engine.take(event, monotonic())
            taken = True
            event = inbox.get_nowait()
    except Empty:
        engine.expire(monotonic())
    return taken


def take_harmless(engine: Engine, inbox: "SimpleQueue[object]") -> list[object]:
    """Hand events of the inbox to the engine while a step is under way, up to the first one that
    has to wait for its end: that one is returned, those behind it stay where they are."""
    try:
        while True:
            event = inbox.get_nowait()
            if not engine.harmless(event):
                return [event]
            engine.take(event, monotonic())
    except Empty:
        return []
