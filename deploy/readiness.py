"""Asks the processes of a deployment whether they do their work. Used by the supervisor.

A worker is ready when the registry shows it with the pid of its present life; the router when its
`/health` says 200; Redis when it answers.
"""

import asyncio
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from common.records import Keys
from common.redis_client import open_redis
from deploy.process import Process

ANSWER_S = 2.0


async def http_status(url: str) -> int:
    """Status of a GET; 0 if nobody answers in time."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port, ssl=_unverified() if parts.scheme == "https" else None
            )
            try:
                writer.write(
                    f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                words = (await reader.readline()).split()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def _unverified() -> ssl.SSLContext:
    """For our own server on this machine, whatever name its certificate has."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class DeploymentReadiness:
    """redis_name and router_name: names of those processes; every other one is a worker.

    workers: worker id by process name.
    """

    def __init__(
        self, redis_url: str, namespace: str, router_url: str, workers: dict[str, str]
    ) -> None:
        self._redis_url = redis_url
        self._keys = Keys(namespace)
        self._router_url = router_url
        self._workers = workers

    async def ready(self, starting: Sequence[Process]) -> set[str]:
        result: set[str] = set()
        client = open_redis(self._redis_url)
        try:
            await client.ping()
            result.add("redis")
            for process in starting:
                if process.name in self._workers:
                    key = self._keys.worker(self._workers[process.name])
                    pid = await client.hget(key, "pid")
                    if pid == str(process.pid).encode():
                        result.add(process.name)
        except (RedisError, OSError):
            pass  # it starts, or starts again: asked again soon
        finally:
            await client.aclose()
        if any(process.name == "router" for process in starting):
            if await http_status(f"{self._router_url}/health") == 200:
                result.add("router")
        return result
