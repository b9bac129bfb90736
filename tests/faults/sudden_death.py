"""A worker that kills itself (SIGKILL) at a chosen step of the protocol, before or after it.

Before: nothing of the step was done. After: it was done, and nobody was told yet.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from kvtransfer import commands, protocol
from kvtransfer.endpoint import Endpoint

COMMANDS: dict[str, tuple[str, type[object]]] = {
    "open": ("_sender", commands.Open),
    "offer": ("_sender", commands.Offer),
    "close": ("_sender", commands.Close),
    "grant": ("_receiver", commands.Grant),
}
MESSAGES: dict[str, tuple[str, type[object]]] = {
    "welcome": ("_sender", protocol.Welcome),
    "waiting": ("_sender", protocol.Waiting),
    "ticket": ("_sender", protocol.Ticket),
    "landed": ("_sender", protocol.Landed),
    "ack": ("_sender", protocol.Ack),
    "hello": ("_receiver", protocol.Hello),
    "begin": ("_receiver", protocol.Begin),
    "closed": ("_receiver", protocol.Close),
}
CALLS = {
    "ship": ("_sender", "next_shipment"),
    "accept": ("_receiver", "accept"),
    "land": ("_receiver", "landed"),
    "arrive": ("_receiver", "_arrive"),
}


class SuddenDeath:
    def __init__(self, die_at: str, count: int, last_words: Callable[[str], None]) -> None:
        self._step, _, self._when = die_at.partition(".")
        assert self._when in ("before", "after"), die_at
        self._count = count
        self._armed = False
        self._last_words = last_words

    def arm(self) -> None:
        self._armed = True

    def watch(self, endpoint: Endpoint, runner: object) -> None:
        """Put the step under watch; unarmed, nothing changes."""
        step = self._step
        if step == "step":
            self._wrap(runner, "step", lambda args: True)
        elif step in CALLS:
            owner, name = CALLS[step]
            self._wrap(getattr(endpoint, owner), name, lambda args: True)
        elif step in COMMANDS:
            owner, kind = COMMANDS[step]
            self._wrap(getattr(endpoint, owner), "command", lambda args: isinstance(args[0], kind))
        else:
            owner, kind = MESSAGES[step]
            self._wrap(getattr(endpoint, owner), "message", lambda args: isinstance(args[1], kind))

    def _wrap(self, owner: object, name: str, meant: Callable[[tuple[Any, ...]], bool]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            counts = self._armed and meant(args)
            if counts and self._when == "before":
                self._strike()
            result = original(*args)
            # A call that had nothing to do was not that step.
            if counts and self._when == "after" and result is not None and result is not False:
                self._strike()
            elif counts and self._when == "after" and name in ("command", "message", "landed"):
                self._strike()
            return result

        setattr(owner, name, watched)

    def _strike(self) -> None:
        self._count -= 1
        if self._count <= 0:
            self._last_words(f"{self._step}.{self._when}")
            os.kill(os.getpid(), signal.SIGKILL)
