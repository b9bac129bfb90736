"""A worker's side of the Redis directory: it registers itself and publishes its blocks.

Owned by the worker's I/O thread; all methods are called in its asyncio loop. Nothing here decides
about life or memory: while Redis is away the worker serves on, and what could not be published is
made good by one new snapshot. Memory is bounded by the number of blocks.

Two ways of writing: `_announce` (description and snapshot in one transaction, at the start, in a
new epoch and whenever Redis was away) and then, while that holds, `_flush` and `_renew`. What is
written is built without a pause, so that number, digest and snapshot always belong together.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError
from redis.typing import EncodableT

from common.blockhash import BlockHash
from common.holdings import Holdings
from common.messages import WorkerInfo
from common.records import (
    EVENT_HASHES,
    MAX_EVENTS,
    SHARED_TTL_S,
    SNAPSHOT_TTL_S,
    Event,
    Joined,
    Keys,
    Left,
    encode_info,
)
from common.redis_client import cancelled, next_retry_s, open_redis

log = logging.getLogger(__name__)

NEVER: Final = math.inf


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a worker writes, in seconds."""

    flush_s: float = 0.05
    digest_s: float = 2.0
    snapshot_s: float = 5.0


def _text(reply: Any) -> str:
    assert isinstance(reply, bytes), f"Redis answered {reply!r} instead of a stream id"
    return reply.decode()


class Registration:
    def __init__(
        self, url: str, namespace: str, ttl_s: float, info: WorkerInfo, pace: Pace = Pace()
    ) -> None:
        """Raises ConfigError for a bad URL."""
        self._client = open_redis(url)
        self._keys = Keys(namespace)
        self._ttl_ms = int(ttl_s * 1000)
        self._pace = pace
        self._info = info
        self._shown: WorkerInfo | None = None
        """What Redis shows, continued by the events; None: everything must be announced."""
        self._holdings = Holdings(info.id, info.epoch)
        self._position = "0-0"
        """A place in the stream behind which all of our later events are."""
        self._stale: list[str] = []
        """Snapshots of earlier epochs, to be deleted."""
        self._flush_at = self._snapshot_at = NEVER
        self._renew_at = self._digest_at = 0.0
        self._stored_at = -NEVER
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._left = False

    def publish(self, stored: Iterable[BlockHash], evicted: Iterable[BlockHash]) -> None:
        """Blocks that became matchable and blocks that no longer are. Never blocks."""
        was_full = self._holdings.num_pending >= EVENT_HASHES
        self._holdings.note(stored, evicted)
        if self._holdings.num_pending >= EVENT_HASHES and not was_full:
            self._flush_at = 0.0
        elif self._holdings.num_pending and self._flush_at == NEVER:
            self._flush_at = time.monotonic() + self._pace.flush_s
        else:
            return
        self._wake.set()

    def set_state(self, state: str) -> None:
        self._info = msgspec.structs.replace(self._info, state=state)
        self._renew_at = 0.0
        self._wake.set()

    def replace(self, info: WorkerInfo, hashes: Iterable[BlockHash]) -> None:
        """A new epoch, which begins with these blocks."""
        assert info.epoch != self._info.epoch, f"epoch {info.epoch} again"
        self._stale.append(self._keys.blocks(self._info.id, self._info.epoch))
        self._info = info
        self._holdings = Holdings(info.id, info.epoch, hashes)
        self._shown = None
        self._wake.set()

    async def run(self) -> None:
        """Keeps the registration until `leave`. Ends by cancellation or after `leave`."""
        retry_s = 0.0
        try:
            while not self._left and not cancelled():
                try:
                    async with self._writing:
                        await self._write()
                    if retry_s:
                        log.info("redis is back; %s announced itself again", self._info.id)
                    retry_s = 0.0
                except (RedisError, OSError) as error:
                    if not retry_s:
                        log.warning("redis is unreachable, %s serves on: %s", self._info.id, error)
                    retry_s = next_retry_s(retry_s)
                    self._shown = None
                    await self._client.connection_pool.disconnect()
                await self._pause(retry_s)
        finally:
            async with self._writing:
                await self._client.aclose()

    async def leave(self) -> None:
        """Deletes this worker's keys and ends `run`. Redis may be away: keys expire then."""
        self._left = True
        self._wake.set()
        id, epoch = self._info.id, self._info.epoch
        async with self._writing:
            try:
                pipe = self._client.pipeline(transaction=True)
                pipe.delete(self._keys.worker(id), self._keys.blocks(id, epoch), *self._stale)
                pipe.srem(self._keys.workers, id)
                self._add(pipe, Left(id, epoch))
                await pipe.execute()
            except (RedisError, OSError) as error:
                log.warning("%s leaves its registry entry to expire: %s", id, error)
            finally:
                await self._client.aclose()

    async def _pause(self, retry_s: float) -> None:
        """Until something is due. While Redis is away only the time to the next try counts."""
        if retry_s:
            await asyncio.sleep(retry_s)
            return
        if self._shown is None or self._left:
            return
        due = min(self._flush_at, self._renew_at, self._digest_at, self._snapshot_at)
        self._wake.clear()
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _write(self) -> None:
        now = time.monotonic()
        if self._left:
            return
        if self._shown is None:
            await self._announce(now)
            return
        if now >= min(self._flush_at, self._digest_at, self._snapshot_at):
            await self._flush(now)
        if self._shown is not None and now >= self._renew_at:
            await self._renew(now)

    async def _announce(self, now: float) -> None:
        """Everything anew. The number is skipped, so that whoever followed reads the snapshot."""
        last = await self._client.xrevrange(self._keys.events, count=1)
        self._position = _text(last[0][0]) if last else "0-0"
        info, stale = self._info, list(self._stale)
        self._holdings.skip()
        self._flush_at = NEVER
        self._renew_at = now + self._ttl_ms / 3000
        self._digest_at = now + self._pace.digest_s
        pipe = self._client.pipeline(transaction=True)
        self._store(pipe, now)
        if stale:
            pipe.delete(*stale)
        self._add(pipe, Joined(info.id, info.epoch))
        self._add(pipe, self._holdings.digest())
        self._describe(pipe)
        await pipe.execute()
        self._stale = self._stale[len(stale) :]
        if self._info is info:  # else it changed meanwhile and is announced again
            self._shown = info

    async def _flush(self, now: float) -> None:
        events: list[Event] = [*self._holdings.take_changes()]
        self._flush_at = NEVER
        if events:
            self._snapshot_at = min(self._snapshot_at, self._stored_at + self._pace.snapshot_s)
        if now >= self._digest_at:
            self._digest_at = now + self._pace.digest_s
            events.append(self._holdings.digest())
        pipe = self._client.pipeline(transaction=False)
        for event in events:
            self._add(pipe, event)
        if now >= self._snapshot_at:
            self._store(pipe, now)
        pipe.pexpire(self._keys.worker(self._info.id), self._ttl_ms)
        replies = await pipe.execute()
        if events:
            self._position = _text(replies[len(events) - 1])
        if not replies[-1]:  # Redis was emptied, perhaps by a restart between two writes
            self._shown = None

    async def _renew(self, now: float) -> None:
        info = self._info
        self._renew_at = now + self._ttl_ms / 3000
        pipe = self._client.pipeline(transaction=True)
        if self._shown is not info:
            self._add(pipe, Joined(info.id, info.epoch))
        self._describe(pipe)
        pipe.expire(self._keys.blocks(info.id, info.epoch), SNAPSHOT_TTL_S)
        replies = await pipe.execute()
        if not replies[-1]:  # somebody emptied Redis: the snapshot is gone
            self._snapshot_at = 0.0
        if self._info is info:
            self._shown = info

    def _describe(self, pipe: Pipeline) -> None:
        key = self._keys.worker(self._info.id)
        fields: Any = encode_info(self._info)  # redis types its mappings as invariant
        pipe.hset(key, mapping=fields)
        pipe.pexpire(key, self._ttl_ms)
        pipe.sadd(self._keys.workers, self._info.id)
        pipe.expire(self._keys.workers, SHARED_TTL_S)
        pipe.expire(self._keys.events, SHARED_TTL_S)

    def _store(self, pipe: Pipeline, now: float) -> None:
        self._stored_at = now
        self._snapshot_at = NEVER
        key = self._keys.blocks(self._info.id, self._info.epoch)
        snapshot = self._holdings.snapshot(self._position)
        pipe.set(key, msgspec.msgpack.encode(snapshot), ex=SNAPSHOT_TTL_S)

    def _add(self, pipe: Pipeline, event: Event) -> None:
        fields: dict[EncodableT, EncodableT] = {"e": msgspec.msgpack.encode(event)}
        pipe.xadd(self._keys.events, fields, maxlen=MAX_EVENTS, approximate=True)
