"""The senders that a receiver knows, and the routes on which their answers go.

Each life (id, epoch) is a source of its own. Used by `Receiver` alone.
"""

from collections.abc import Iterator

from common.messages import Peer
from kvtransfer.incoming import Source
from kvtransfer.timers import Timers

MAX_SOURCES = 4096


class Sources:
    """Sources by life and by route. A source without a route must say Hello again."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._lives: dict[tuple[str, int], Source] = {}
        self._routes: dict[bytes, Source] = {}

    def __iter__(self) -> Iterator[Source]:
        """Over a copy: sources may be removed meanwhile."""
        return iter(list(self._lives.values()))

    def is_full(self) -> bool:
        return len(self._lives) >= MAX_SOURCES

    def oldest(self) -> Source:
        """The one that was silent longest."""
        return min(self._lives.values(), key=lambda source: source.heard_at)

    def greet(self, peer: Peer, route: bytes, now: float) -> Source:
        """A sender says Hello, for the first time or on a new connection."""
        source = self._lives.get((peer.id, peer.epoch))
        if source is None:
            source = self._lives[peer.id, peer.epoch] = Source(peer, route, heard_at=now)
            self._suspect_others(peer, now)
        self._routes.pop(source.route, None)
        self._routes[route] = source
        source.peer, source.route, source.heard_at, source.lost_at = peer, route, now, None
        return source

    def hear(self, route: bytes, now: float) -> Source | None:
        """Who sends on this route; it is alive."""
        source = self._routes.get(route)
        if source is not None:
            source.heard_at, source.lost_at = now, None
        return source

    def find(self, peer: Peer) -> Source | None:
        """This life of this worker, if it said Hello."""
        return self._lives.get((peer.id, peer.epoch))

    def unreachable(self, route: bytes, now: float) -> None:
        """The connection of this route is closed. It comes back with a Hello or not at all."""
        source = self._routes.pop(route, None)
        if source is not None and source.lost_at is None:
            source.lost_at = now

    def is_over(self, source: Source, now: float) -> bool:
        """Whether to forget this one: it is lost, or has long been silent without transfers."""
        if source.lost_at is not None:
            return now - source.lost_at > self._timers.grace_s
        return not source.transfers and now - source.heard_at > 2 * self._timers.idle_s

    def remove(self, source: Source) -> None:
        assert not source.transfers, source.peer
        self._routes.pop(source.route, None)
        del self._lives[source.peer.id, source.peer.epoch]

    def _suspect_others(self, peer: Peer, now: float) -> None:
        """A worker that says Hello as a new life has probably lost the one before, unless that
        one speaks again: their messages may be read in any order."""
        for source in self._lives.values():
            if source.peer.id == peer.id and source.peer.epoch != peer.epoch:
                source.lost_at = now if source.lost_at is None else source.lost_at
