"""How every process talks to Redis: a client that gives up soon and hides no outage.

Used by `common.registry` and `router.directory`, whose loops reconnect themselves, because they
have to do something about it that Redis was away.
"""

import asyncio
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from common.errors import ConfigError

TIMEOUT_S: Final = 2.0
"""Every command is answered within this time or Redis counts as unreachable."""
FIRST_RETRY_S: Final = 0.05
LAST_RETRY_S: Final = 1.0


def open_redis(url: str) -> Redis:
    """A client that connects when it is first used. Raises ConfigError for a bad URL."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        raise ConfigError(f"bad Redis URL {url!r}: {error}") from error


async def check_redis(url: str) -> None:
    """Raises ConfigError if no Redis answers at `url`."""
    client = open_redis(url)
    try:
        await client.echo("tandem")
    except (RedisError, OSError) as error:
        raise ConfigError(f"Redis at {url} does not answer: {error}") from error
    finally:
        await client.aclose()


def next_retry_s(retry_s: float) -> float:
    """The pause after the next failure; `retry_s` is the last one, 0 if there was none."""
    return min(max(2 * retry_s, FIRST_RETRY_S), LAST_RETRY_S)


def cancelled() -> bool:
    """Whether the current task was asked to end.

    A loop around Redis commands must look: they use `asyncio.wait_for`, which in Python 3.11
    loses a cancellation that comes just when the command was sent.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
