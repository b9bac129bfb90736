"""API keys in Redis, for all routers of a deployment: followed by one task of each router.

The hash `tandem:{namespace}:api-keys` has a field for each key, its SHA-256 in hex, whose value is
the tenant: `redis-cli HSET tandem:default:api-keys SHA256 TENANT`; `HDEL` takes a key back. A
change is known within two seconds. While Redis is away, what was known stays. Made by
`router.main`; `router.keys` asks for what it knows.
"""

import asyncio
import logging

from redis.exceptions import RedisError

from common.errors import ConfigError
from common.records import Keys as Names
from common.redis_client import cancelled, next_retry_s, open_redis
from router.keys import RELOAD_S, Entry, Keys, entry

log = logging.getLogger(__name__)


class SharedKeys:
    def __init__(self, url: str, namespace: str, keys: Keys) -> None:
        self._client = open_redis(url)
        self._name = Names(namespace).api_keys
        self._keys = keys
        self._num_bad = 0

    async def load(self) -> None:
        """Tell `keys` what Redis holds now. Raises RedisError, OSError."""
        fields = await self._client.hgetall(self._name)
        entries: list[Entry] = []
        for digest, tenant in fields.items():
            try:
                entries.append(entry(_text(tenant), _text(digest)))
            except (ConfigError, UnicodeDecodeError):
                continue
        num_bad = len(fields) - len(entries)
        if num_bad > self._num_bad:
            log.error("%d fields of %s are no API keys", num_bad, self._name)
        self._num_bad = num_bad
        self._keys.shared = tuple(entries)

    async def run(self) -> None:
        """Follows Redis until it is cancelled, through every outage."""
        retry_s = 0.0
        try:
            while not cancelled():
                try:
                    await self.load()
                    retry_s = 0.0
                except (RedisError, OSError) as error:
                    if not retry_s:
                        log.warning("the API keys stay as they were: %s", error)
                    retry_s = next_retry_s(retry_s)
                    await self._client.connection_pool.disconnect()
                await asyncio.sleep(retry_s or RELOAD_S)
        finally:
            await self.close()

    async def close(self) -> None:
        await self._client.aclose()


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
