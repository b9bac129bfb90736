"""Real worker processes and a bare client of them: no router, no HTTP.

async with workers(checkpoint, "prefill", "decode") as fleet:
    stream = await fleet.generate(prompt, params)
"""

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from common.blockhash import pack_tokens
from common.config import TimerConfig
from common.link import Down, Message, RouterLink, Up
from common.messages import (
    Admit,
    Cancel,
    Failed,
    Inspect,
    Inspected,
    Leaving,
    Ledger,
    Peer,
    Prefill,
    Step,
    WorkerInfo,
)
from common.sampling import SamplingParams
from router.directory import Directory
from tests.pair import Stream
from tests.redis_server import RedisServer

START_S = 60.0


def spawn(role: str, checkpoint: Path, redis_url: str, *flags: str) -> "subprocess.Popen[str]":
    """One worker process, float32 on one thread."""
    argv = ["--model", str(checkpoint), "--redis", redis_url, "--dtype", "float32"]
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", role, *argv, "--threads", "1", *flags],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass
class Request:
    """What a client knows of one request."""

    streams: dict[int, Stream]
    failed: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    """Workers that are up, by role, and the link to them."""

    def __init__(self, link: RouterLink) -> None:
        self.link = link
        self.workers: dict[str, WorkerInfo] = {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.changed = asyncio.Condition()
        self.ups = 0
        self.down: list[str] = []
        self.leaving: list[tuple[str, bool]] = []
        self._ledgers: dict[str, Ledger] = {}
        self._requests: dict[int, Request] = {}
        self._num_requests = 0

    def peer(self, role: str) -> Peer:
        info = self.workers[role]
        return Peer(info.id, info.epoch, info.kv_address, info.curve_key)

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        choices: tuple[int, ...] = (0,),
        local: bool = False,
    ) -> int:
        """Place a request; returns its number."""
        self._num_requests += 1
        number = self._num_requests
        self._requests[number] = Request({choice: Stream() for choice in choices})
        work = {
            "request": number,
            "attempt": 0,
            "tokens": pack_tokens(tokens),
            "prompt_len": len(tokens),
            "choices": choices,
            "params": params,
        }
        if not local:
            prefill = Prefill(**work, decode=self.peer("decode"))  # type: ignore[arg-type]
            self.link.send(self.workers["prefill"].id, prefill)
        source = None if local else self.peer("prefill")
        admit = Admit(**work, prefill=source)  # type: ignore[arg-type]
        self.link.send(self.workers["decode"].id, admit)
        return number

    def cancel(self, number: int) -> None:
        for info in self.workers.values():
            self.link.send(info.id, Cancel(number, 0))

    def stream(self, number: int, choice: int = 0) -> Stream:
        """What came so far."""
        return self._requests[number].streams[choice]

    async def finished(self, number: int, timeout_s: float = 30.0) -> Request:
        async with asyncio.timeout(timeout_s):
            await self._requests[number].done.wait()
        return self._requests[number]

    async def generate(
        self, tokens: list[int], params: SamplingParams, *, local: bool = False
    ) -> list[int]:
        """The tokens of one choice."""
        request = await self.finished(self.submit(tokens, params, local=local))
        assert not request.failed, request.failed
        return request.streams[0].tokens

    async def ledger(self, role: str) -> Ledger:
        """Asked of the worker now."""
        self._ledgers.pop(role, None)
        self.link.send(self.workers[role].id, Inspect(0))
        await self.until(lambda: role in self._ledgers)
        return self._ledgers[role]

    async def quiet(self, role: str, timeout_s: float = 10.0) -> Ledger:
        """The ledger once nothing is held any more."""
        async with asyncio.timeout(timeout_s):
            while True:
                ledger = await self.ledger(role)
                assert ledger.balanced, ledger
                if ledger.free + ledger.cached == ledger.num_blocks and not ledger.running:
                    return ledger
                await asyncio.sleep(0.02)

    async def until(self, holds, timeout_s: float = 30.0) -> None:  # type: ignore[no-untyped-def]
        """Wait until `holds()`, looked at after each message."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(holds)

    async def read(self) -> None:
        """Follow the link for ever."""
        while True:
            event = await self.link.receive()
            async with self.changed:
                match event:
                    case Up(info):
                        self.workers[info.role] = info
                        self.ups += 1
                    case Down(worker_id):
                        self.down.append(worker_id)
                    case Message(worker_id, message):
                        self._take(worker_id, message)
                self.changed.notify_all()

    def _take(self, worker_id: str, message: object) -> None:
        match message:
            case Step(outputs):
                for output in outputs:
                    request = self._requests[output.request]
                    stream = request.streams[output.choice]
                    known = stream.tokens[output.index :][: len(output.tokens)]
                    assert list(output.tokens[: len(known)]) == known, (output, stream)
                    stream.tokens += output.tokens[len(known) :]
                    stream.finish = stream.finish or output.finish
                    stream.cached = max(stream.cached, output.cached_tokens)
                    if all(stream.finish for stream in request.streams.values()):
                        request.done.set()
            case Failed(number, _, reason):
                self._requests[number].failed = reason
                self._requests[number].done.set()
            case Inspected(_, ledger):
                roles = {info.id: role for role, info in self.workers.items()}
                self._ledgers[roles[worker_id]] = ledger
            case Leaving(done):
                self.leaving.append((worker_id, done))


@contextlib.asynccontextmanager
async def workers(
    checkpoint: Path, *roles: str, flags: tuple[str, ...] = ()
) -> AsyncIterator[Fleet]:
    """Start one worker of each role and a Redis; end all of them."""
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
        redis = RedisServer(Path(directory))
        redis.start()
        timers = TimerConfig()
        fleet = Fleet(RouterLink("test", timers))
        registry = Directory(redis.url, "default", refresh_s=0.05)
        tasks = [asyncio.create_task(registry.run()), asyncio.create_task(fleet.read())]
        try:
            for role in roles:
                fleet.processes[role] = spawn(role, checkpoint, redis.url, *flags)
            async with asyncio.timeout(START_S):
                while len(registry.workers) < len(roles):
                    await registry.changed()
                    for process in fleet.processes.values():
                        assert process.poll() is None, process.communicate()
            for info in registry.workers.values():
                fleet.link.connect(info)
            await fleet.until(lambda: len(fleet.workers) == len(roles))
            yield fleet
        finally:
            for process in fleet.processes.values():
                process.kill()
                process.communicate()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await fleet.link.close()
            redis.kill()


def stop(process: "subprocess.Popen[str]", timeout_s: float = 20.0) -> tuple[int, str]:
    """SIGTERM, twice; returns exit code and stderr."""
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors
