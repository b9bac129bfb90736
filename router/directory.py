"""What Redis says, followed by one router: which workers exist and which blocks they hold.

Owned by the router's loop; `run` is one task that reads everything in order (worker set,
snapshots, event stream), so nothing here overtakes anything. The answers come from memory and
stay while Redis is away: it says who exists, the link says who lives.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, cast

from redis.exceptions import RedisError

from common.blockhash import BlockHash
from common.errors import ProtocolError
from common.messages import WorkerInfo
from common.records import (
    Changed,
    Digest,
    Event,
    Joined,
    Keys,
    Left,
    decode_event,
    decode_info,
    decode_snapshot,
    unpack_hashes,
)
from common.redis_client import TIMEOUT_S, cancelled, next_retry_s, open_redis
from router.events import EventStream
from router.follower import Follower
from router.index import BlockIndex

log = logging.getLogger(__name__)

SWEEP: Final = 8_192
"""Hashes that are swept after each read (about a millisecond)."""
SWEEP_PAUSE_S: Final = 0.01


class Directory:
    """Counts bad records (`malformed`), losses that were noticed (`gaps`), snapshots loaded."""

    def __init__(
        self, url: str, namespace: str, *, refresh_s: float = 1.0, grace_s: float = 5.0
    ) -> None:
        """refresh_s: interval of reading the worker set. grace_s: how long a healthy Redis,
        which may have been emptied, must not show a worker before it is dropped.
        Raises ConfigError for a bad URL."""
        assert refresh_s < TIMEOUT_S, f"a read that blocks for {refresh_s} s would time out"
        self._client = open_redis(url)
        self._keys = Keys(namespace)
        self._refresh_s = refresh_s
        self._grace_s = grace_s
        self._followers: dict[str, Follower] = {}
        self._indexes: dict[tuple[str, int], BlockIndex] = {}
        self._workers: dict[str, WorkerInfo] = {}
        self._events = EventStream(self._client, self._keys)
        self._unreadable: set[str] = set()
        """Workers whose record is bad; each is logged once."""
        self._refreshed_at = self._refresh_at = 0.0
        self._changed = asyncio.Event()
        self.malformed = 0
        self.snapshots = 0
        self.gaps = 0

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """The workers that the registry shows, by id."""
        return self._workers

    async def changed(self) -> None:
        """Returns when `workers` changed since the last call. For one caller."""
        await self._changed.wait()
        self._changed.clear()

    def forget(self, worker_id: str) -> None:
        """The link says that this worker is dead: it holds nothing until it says otherwise."""
        follower = self._followers.get(worker_id)
        if follower is not None:
            follower.forget()

    def matches(
        self, content_id: str, block_size: int, hashes: Sequence[BlockHash]
    ) -> dict[str, int]:
        """Worker id -> blocks of this prefix that it holds, for those that hold any."""
        index = self._indexes.get((content_id, block_size))
        return index.matches(hashes) if index is not None else {}

    async def run(self) -> None:
        """Follows Redis until it is cancelled, through every outage."""
        retry_s = 0.0
        try:
            while not cancelled():
                try:
                    await self._follow()
                    if retry_s:
                        log.info("redis is back")
                    retry_s = 0.0
                except (RedisError, OSError) as error:
                    if not retry_s:
                        log.warning("redis is unreachable, serving from memory: %s", error)
                    retry_s = next_retry_s(retry_s)
                    for follower in self._followers.values():
                        follower.absent_since = None
                    self._refresh_at = 0.0
                    await self._client.connection_pool.disconnect()
                    await asyncio.sleep(retry_s)
        finally:
            await self._client.aclose()

    async def _follow(self) -> None:
        """One round: the worker set if due, the snapshots that are due, the next events."""
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refreshed_at, self._refresh_at = now, now + self._refresh_s
            await self._refresh()
        for follower in list(self._followers.values()):
            if follower.wants_snapshot and now >= follower.sync_at:
                follower.sync_at = now + self._refresh_s
                await self._sync(follower)
        for fields in await self._events.read(self._idle_s()):
            try:
                self._apply(decode_event(fields))
            except ProtocolError as error:
                self.malformed += 1
                log.debug("dropped an event: %s", error)
            await asyncio.sleep(0)  # up to a millisecond of work for each
        for index in self._indexes.values():
            index.sweep(SWEEP)

    async def _refresh(self) -> None:
        await self._events.settle()
        ids: Any = await cast(Awaitable[Any], self._client.smembers(self._keys.workers))
        names = sorted(id.decode(errors="replace") for id in ids)
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.hgetall(self._keys.worker(name))
        shown = dict(zip(names, await pipe.execute(), strict=True))
        for name, fields in shown.items():
            if fields:
                self._read_worker(name, fields)
        self._expire({name for name, fields in shown.items() if fields})
        gone = [n for n, fields in shown.items() if not fields and n not in self._followers]
        if gone:  # a worker that comes back adds itself again
            await self._client.srem(self._keys.workers, *gone)

    def _read_worker(self, name: str, fields: dict[bytes, bytes]) -> None:
        try:
            info = decode_info(fields)
            if info.id != name:
                raise ProtocolError(f"worker {info.id} under the name of {name}")
        except ProtocolError as error:
            self.malformed += 1
            if name not in self._unreadable:
                self._unreadable.add(name)
                log.warning("cannot read worker %s in redis: %s", name, error)
            return
        self._unreadable.discard(name)
        self._see(info)

    def _see(self, info: WorkerInfo) -> None:
        name = info.id
        follower = self._followers.get(name)
        if follower is None or _life(follower.info) != _life(info):
            if follower is not None:
                follower.drop()
            index = self._indexes.setdefault(_place(info), BlockIndex())
            follower = self._followers[name] = Follower(info, index)
        follower.info = info
        follower.absent_since = None
        if self._workers.get(name) != info:
            self._workers[name] = info
            self._changed.set()

    def _expire(self, present: set[str]) -> None:
        now = time.monotonic()
        for name, follower in list(self._followers.items()):
            if name not in present:
                if follower.absent_since is None:
                    follower.absent_since = now
                if now - follower.absent_since >= self._grace_s:
                    self._drop(name)

    def _drop(self, worker_id: str) -> None:
        follower = self._followers.pop(worker_id)
        follower.drop()
        place = _place(follower.info)
        if all(_place(other.info) != place for other in self._followers.values()):
            del self._indexes[place]
        del self._workers[worker_id]
        self._changed.set()

    async def _sync(self, follower: Follower) -> None:
        """Load the worker's snapshot and what the stream added to it up to now; not if that
        leaves a gap: a newer snapshot is on the way then."""
        info = follower.info
        data = await self._client.get(self._keys.blocks(info.id, info.epoch))
        if not isinstance(data, bytes):
            return
        try:
            snapshot = decode_snapshot(data)
            hashes = unpack_hashes(snapshot.hashes)
            changes = await self._events.changes_after(snapshot, info)
            seq = snapshot.seq + len(changes or ())
            if changes is not None and seq >= follower.seq:
                await follower.load(snapshot.seq, hashes, changes)
                self.snapshots += 1
        except ProtocolError as error:
            self.malformed += 1
            log.debug("dropped a snapshot: %s", error)

    def _idle_s(self) -> float:
        """Time until something else than the next event is due."""
        now = time.monotonic()
        due = self._refresh_at
        for follower in self._followers.values():
            if follower.wants_snapshot:
                due = min(due, follower.sync_at)
        if not all(index.swept for index in self._indexes.values()):
            due = min(due, now + SWEEP_PAUSE_S)
        return max(0.0, due - now)

    def _apply(self, event: Event) -> None:
        """Raises ProtocolError."""
        follower = self._followers.get(event.worker)
        known = follower is not None and follower.info.epoch == event.epoch
        if isinstance(event, Joined) or not known:
            # Soon, but not for each of many events: who they are about may have a bad record.
            self._refresh_at = min(self._refresh_at, self._refreshed_at + self._refresh_s / 10)
        if follower is None or not known:
            return
        if isinstance(event, Left):
            self._drop(event.worker)
        elif isinstance(event, Changed):
            self.gaps += follower.change(event)
        elif isinstance(event, Digest):
            self.gaps += follower.check(event)


def _life(info: WorkerInfo) -> tuple[int, str, int]:
    return (info.epoch, *_place(info))


def _place(info: WorkerInfo) -> tuple[str, int]:
    """Which index holds the worker's blocks."""
    return info.content_id, info.layout.block_size
