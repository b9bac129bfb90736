"""What a client has not read yet: the events of one HTTP call, and where they end.

The dispatcher puts events in and never waits; `router.reply` takes them out and writes them, or,
where nothing is in the way, is handed each at once, which spares a task switch per token. A
client that stops reading must not make the router remember its whole answer: while a write does
not go through, only so many events may come together.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from router.request import Event

MAX_EVENTS: Final = 1_024
MAX_EVENTS_PER_CHOICE: Final = 16
"""On top: the choices of one call move together."""


class Backlog(asyncio.Queue[Event | None]):
    """Events of a call in order; None: its client is gone, or too far behind."""

    def __init__(self, num_choices: int) -> None:
        super().__init__()
        self.limit = MAX_EVENTS + MAX_EVENTS_PER_CHOICE * num_choices
        self.is_writing = False
        """A write is under way. The reader of this queue takes everything in between, so only
        during a write does its length say something about the client."""
        self.overflow = asyncio.Event()
        """The client was too far behind; what it did not get is dropped."""
        self.write_now: Callable[[Event | None], bool] | None = None
        """Writes an event in the call that puts it in; False: it must wait for its turn here."""

    def put_nowait(self, item: Event | None) -> None:
        if self.overflow.is_set():
            return
        # Nothing overtakes what waits here or is being written.
        if self.write_now is not None and not self.is_writing and self.empty():
            if self.write_now(item):
                return
        if self.is_writing and self.qsize() >= self.limit:
            self.overflow.set()
            while not self.empty():
                self.get_nowait()
            item = None
        super().put_nowait(item)
