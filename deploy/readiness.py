"""Asks the processes of a deployment whether they do their work. Used by the supervisor.

A worker is ready when the registry shows it with the pid of its present life and the router gives
work to as many of its role; the router when its `/health` says 200; Redis when it answers.
"""

import asyncio
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec
from redis.exceptions import RedisError

from common.records import Keys
from common.redis_client import open_redis
from deploy.process import Process

ANSWER_S = 2.0


class _Health(msgspec.Struct):
    """What `/health` of a router says."""

    workers: dict[str, int]


async def http_get(url: str) -> tuple[int, bytes]:
    """Status and body of a GET; 0 if nobody answers in time."""
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
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    words = head.partition(b"\r\n")[0].split()
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body


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
        result = await self._registered(starting)
        status, body = await http_get(f"{self._router_url}/health")
        if status != 200:
            return result & {"redis"}
        try:
            known = msgspec.json.decode(body, type=_Health).workers
        except msgspec.DecodeError:
            return result & {"redis"}  # whoever has the port of our router, which will say so
        absent = {process.name for process in starting} - result
        for role in ("prefill", "decode"):
            mine = {name for name in self._workers if name.partition("-")[0] == role}
            if known.get(role, 0) < len(mine - absent):
                result -= mine
        return result | {"router"}

    async def _registered(self, starting: Sequence[Process]) -> set[str]:
        """Redis, if it answers, and the workers that it knows."""
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
        return result
