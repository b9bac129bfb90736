"""The load that routers have placed, told to each other through Redis.

    tandem:{ns}:routers             set of router names
    tandem:{ns}:inflight:{router}   hash with TTL, worker id -> msgpack Carried

Each router writes what it has in flight as soon as that changes, and reads what the others have, so
that their placements count before workers report them. Redis is never waited for: without it each
router knows its own load and what the workers say. A router that is gone stops counting with its
TTL. Owned by `router.service`.
"""

import asyncio
import logging
from typing import Any, Final

import msgspec
from redis.exceptions import RedisError

from common.records import Keys
from common.redis_client import cancelled, next_retry_s, open_redis
from router.fleet import Carried, Fleet

log = logging.getLogger(__name__)

TTL_S: Final = 3.0
PACE_S: Final = 0.02
"""Between two writes at least."""
LOOK_S: Final = 0.1
"""Between two looks at the other routers, while there are any."""
ALONE_S: Final = 0.5
"""Between two looks if anybody else is there."""
_decoder = msgspec.msgpack.Decoder(Carried)


class Inflight:
    """`malformed` counts what could not be read."""

    def __init__(self, url: str, namespace: str, name: str, fleet: Fleet) -> None:
        """`name`: of this router. Raises ConfigError for a bad URL."""
        self._client = open_redis(url)
        self._keys = Keys(namespace)
        self._name = name
        self._fleet = fleet
        self._others: list[str] = []
        self._heard = asyncio.Event()
        self.malformed = 0

    async def heard(self) -> None:
        """Returns when the load of the others was read since the last call. For one caller."""
        await self._heard.wait()
        self._heard.clear()

    async def run(self) -> None:
        """Tells and reads until it is cancelled, through every outage."""
        retry_s = 0.0
        try:
            while not cancelled():
                try:
                    await self._exchange()
                    retry_s = 0.0
                    await self._pause()
                except (RedisError, OSError) as error:
                    if not retry_s:
                        log.warning("redis is unreachable, load is not shared: %s", error)
                    retry_s = next_retry_s(retry_s)
                    self._share([])
                    await self._client.connection_pool.disconnect()
                    await asyncio.sleep(retry_s)
        finally:
            await self._leave()

    async def _pause(self) -> None:
        """Until there is something to tell to somebody, or it is time to look."""
        if not self._others:
            await asyncio.sleep(ALONE_S)
            return
        await asyncio.sleep(PACE_S)
        try:
            async with asyncio.timeout(LOOK_S):
                await self._fleet.changed.wait()
        except TimeoutError:
            return

    async def _exchange(self) -> None:
        self._fleet.changed.clear()
        mine: Any = {
            worker: msgspec.msgpack.encode(carried)
            for worker, carried in self._fleet.carried().items()
        }
        key = self._keys.inflight(self._name)
        pipe = self._client.pipeline(transaction=True)
        pipe.delete(key)
        if mine:
            pipe.hset(key, mapping=mine)
            pipe.pexpire(key, int(TTL_S * 1000))
        pipe.sadd(self._keys.routers, self._name)
        pipe.smembers(self._keys.routers)
        for other in self._others:
            pipe.hgetall(self._keys.inflight(other))
        replies = await pipe.execute()
        shown = replies[len(replies) - len(self._others) :] if self._others else []
        self._share(shown)
        names = replies[len(replies) - len(self._others) - 1]
        idle = [name for name, load in zip(self._others, shown, strict=True) if not load]
        self._others = sorted(n.decode(errors="replace") for n in names if n != self._name.encode())
        if idle and not mine:
            await self._forget(idle)

    def _share(self, shown: list[dict[bytes, bytes]]) -> None:
        """`shown`: what each of the others has in flight."""
        # A router without any load may be gone: no seats are kept for it.
        num_others = sum(1 for loads in shown if loads)
        self._fleet.share(self._sum(shown), num_others)
        self._heard.set()

    def _sum(self, shown: list[dict[bytes, bytes]]) -> dict[str, Carried]:
        total: dict[str, Carried] = {}
        for loads in shown:
            for worker, data in loads.items():
                try:
                    carried = _decoder.decode(data)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    self.malformed += 1
                    continue
                name = worker.decode(errors="replace")
                total[name] = total[name] + carried if name in total else carried
        return total

    async def _forget(self, names: list[str]) -> None:
        """Routers that show nothing: whoever is alive adds itself again at its next look."""
        await self._client.srem(self._keys.routers, *names)

    async def _leave(self) -> None:
        try:
            pipe = self._client.pipeline(transaction=True)
            pipe.delete(self._keys.inflight(self._name))
            pipe.srem(self._keys.routers, self._name)
            await pipe.execute()
        except (RedisError, OSError) as error:
            log.info("the shared load of this router is left to expire: %s", error)
        finally:
            await self._client.aclose()
