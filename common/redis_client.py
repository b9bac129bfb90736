"""How every process talks to Redis: a client that gives up soon and hides no outage.

Used by `common.registry` and by what follows Redis in a router, whose loops reconnect themselves,
because they have to do something about it that Redis was away; `deploy.redis_server` shows URLs
with it.
"""

import asyncio
import re
import urllib.parse
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
_USER_INFO: Final = re.compile(r"(?<=://)(?P<user>[^:@/?#]*):.*@", re.DOTALL)
"""Up to the last @: a password with a slash in it makes a bad URL, and is still a password."""
_NO_PORT: Final = re.compile(
    r"(?<=://)(?P<user>[^:@/?#\[]*):(?!\d*(?:[/?#]|$))[^@/?#]*(?![^/?#]*@)"
)
"""What stands for a port and is none may be a password whose host was forgotten."""


def without_password(url: str) -> str:
    """`url` as it may be shown: neither the password before the host nor one in the query."""
    shown = _NO_PORT.sub(r"\g<user>:***", _USER_INFO.sub(r"\g<user>:***@", url))
    head, mark, query = shown.partition("?")
    parts = []
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        if urllib.parse.unquote_plus(name).strip().lower() == "password":
            value = "***"
        parts.append(name + equals + value)
    return head + mark + "&".join(parts)


def bad_url(url: str) -> str:
    """What is wrong with a URL that the client refuses; never in its words, which repeat parts of
    the URL."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        return "it must begin with redis://, rediss:// or unix://"
    return "its port or one of its options is wrong"


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
    except ValueError:
        raise ConfigError(f"bad Redis URL {without_password(url)}: {bad_url(url)}") from None


async def check_redis(url: str) -> None:
    """Raises ConfigError if no Redis answers at `url`."""
    client = open_redis(url)
    try:
        await client.echo("tandem")
    except (RedisError, OSError) as error:
        shown = without_password(url)
        raise ConfigError(f"Redis at {shown} does not answer: {error}") from error
    except TypeError:  # an option that no connection has
        raise ConfigError(f"bad Redis URL {without_password(url)}: {bad_url(url)}") from None
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
