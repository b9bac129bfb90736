"""The queue of attempts for which no worker was free, in order of arrival.

Owned by `router.dispatch`, which fills it, retries it when a worker comes and clears a request's
entries when the request ends.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from router.metrics import RouterMetrics
from router.request import Request

MAX_WAITING: Final = 1_024
"""Attempts that wait for a worker; more are refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Choices of one request that are to be placed."""

    request: Request
    choices: tuple[int, ...]
    timer: asyncio.TimerHandle
    """Ends the patience; cancelled with the entry."""


class WaitingQueue:
    def __init__(self, metrics: RouterMetrics) -> None:
        self._entries: dict[Entry, None] = {}  # in order
        self._gauge = metrics.waiting

    @property
    def full(self) -> bool:
        return len(self._entries) >= MAX_WAITING

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """The entries of this moment, without those that are removed during the iteration."""
        for entry in list(self._entries):
            if entry in self._entries:
                yield entry

    def add(self, entry: Entry) -> None:
        assert not entry.request.over
        self._entries[entry] = None
        self._gauge.set(len(self._entries))

    def remove(self, entry: Entry) -> None:
        entry.timer.cancel()
        del self._entries[entry]
        self._gauge.set(len(self._entries))

    def forget(self, request: Request) -> None:
        """Remove all that waits for `request`."""
        for entry in self:
            if entry.request is request:
                self.remove(entry)
