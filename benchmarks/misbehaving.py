"""What clients that misbehave cost the others: `python -m benchmarks.misbehaving`, in two minutes.

Streams run in closed loops for some seconds, in turns alone and beside clients that read nothing,
send byte by byte, send 50 MB or only keep connections open. The time between tokens of the streams
should not change; neither should the router need more memory than its caps say. Without `--url`
this starts and ends a deployment of its own: one prefill and one decode worker, the demo model.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from benchmarks import machine
from benchmarks.client import Record, Target, connect, send
from benchmarks.compare.paths import LOGS, RESULTS
from benchmarks.compare.server import StartError, free_ports, running, stop_cleanly
from benchmarks.contenders import Contender, up_command

LARGE: Final = 50_000_000
"""Bytes of the body that is too large."""
TOP: Final = 5
"""Logprobs in each answer that nobody reads, so that it is long."""
PAUSE_S: Final = 0.1
"""Between two bytes of a sender that is slow."""
START_S: Final = 120.0
"""How long a deployment of our own may take to come up."""


class Crowd:
    """Clients that misbehave until they are cancelled; `counts` says what they got to do."""

    def __init__(self, url: str, idle: int, slow: int) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle, self._slow = idle, slow
        self.counts = {"idle": 0, "bytes_sent_slowly": 0, "large_bodies": 0, "unread_streams": 0}

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """They are there for as long as this lasts."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(self._idle):
                reader, _ = await stack.enter_async_context(self._connected(b"GET /ping", b"", 0))
                await reader.readuntil(b"\r\n\r\n")
                self.counts["idle"] += 1
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._send_large())]
                for _ in range(self._slow):
                    tasks.append(group.create_task(self._send_slowly()))
                    tasks.append(group.create_task(self._read_nothing()))
                try:
                    yield
                finally:
                    for task in tasks:
                        task.cancel()

    @contextlib.asynccontextmanager
    async def _connected(
        self, start: bytes, body: bytes, length: int
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection on which a request was begun."""
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=2**12)
        try:
            head = b"%s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % start
            writer.write(head + b"content-length: %d\r\n\r\n" % length + body)
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _send_large(self) -> None:
        """One body after the other, as far as the server lets it."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with self._connected(b"POST /v1/completions", b"", LARGE) as (_, writer):
                    for _ in range(LARGE // 2**16):
                        writer.write(b" " * 2**16)
                        await writer.drain()
            self.counts["large_bodies"] += 1
            await asyncio.sleep(PAUSE_S)

    async def _send_slowly(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                async with self._connected(b"POST /v1/completions", b"{", 10_000) as (_, writer):
                    while not writer.is_closing():
                        writer.write(b" ")
                        await writer.drain()
                        self.counts["bytes_sent_slowly"] += 1
                        await asyncio.sleep(PAUSE_S)

    async def _read_nothing(self) -> None:
        """A long stream of which only what the socket takes by itself is read."""
        fields = {"prompt": [5], "stream": True, "max_tokens": 1_000, "ignore_eos": True}
        body = json.dumps(fields | {"logprobs": TOP}).encode()
        while True:
            with contextlib.suppress(OSError):
                request = b"POST /v1/completions"
                async with self._connected(request, body, len(body)) as (reader, writer):
                    self.counts["unread_streams"] += 1
                    while not (reader.at_eof() or writer.is_closing()):
                        await asyncio.sleep(PAUSE_S)


def keep_crowd(url: str, idle: int, slow: int, pipe: Connection) -> None:
    """A process of its own, so that the crowd does not hold up the clock of what is measured: says
    when it is there, leaves when it is told to, and says what it got to do."""

    async def keep() -> None:
        crowd = Crowd(url, idle, slow)
        async with crowd():
            pipe.send({})
            await asyncio.to_thread(pipe.recv)
        pipe.send(crowd.counts)

    asyncio.run(keep())


@contextlib.asynccontextmanager
async def crowded(url: str, idle: int, slow: int, counts: Counter[str]) -> AsyncIterator[None]:
    """Raises EOFError if the crowd did not get there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=keep_crowd, args=(url, idle, slow, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        await asyncio.to_thread(ours.recv)
        yield
        ours.send({})
        counts.update(await asyncio.to_thread(ours.recv))
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)
        ours.close()


async def measure(
    target: Target, num_streams: int, seconds: float, num_others: int = 0
) -> list[Record]:
    """Streams in closed loops for at least so long, beside others that only load the deployment as
    much as those that nobody reads. Raises ConnectionError if one fails."""
    long = replace(target, extra=target.extra | {"logprobs": TOP})
    records: list[Record] = []
    until = time.perf_counter() + seconds
    async with connect() as session:

        async def loop(number: int) -> None:
            while time.perf_counter() < until:
                record = Record(0.0)
                asked = target if number < num_streams else long
                await send(session, asked, asked.body([5 + number], 64), record)
                if not record.ok:
                    raise ConnectionError(record.error)
                if number < num_streams:
                    records.append(record)

        await asyncio.gather(*(loop(number) for number in range(num_streams + num_others)))
    return records


def itl_ms(records: Sequence[Record]) -> list[float]:
    """Times between the chunks of each stream."""
    pairs = ((r.chunks[i], r.chunks[i + 1]) for r in records for i in range(len(r.chunks) - 1))
    return [1e3 * (after - before) for before, after in pairs]


def rss_mib(pid: int | None) -> float | None:
    """Memory of the router, if it is known who that is."""
    if pid is None:
        return None
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return None


@contextlib.contextmanager
def deployment() -> Iterator[tuple[str, int | None]]:
    """(URL, process id of the router) of a deployment that lasts as long as this does. Raises
    StartError."""
    (port,) = free_ports(1)
    contender = Contender("misbehaving", 1.0, prefill=1, decode=1, pinned=False)
    command = up_command(contender, port, sorted(os.sched_getaffinity(0)), None, "")
    with running([command], LOGS, START_S):
        log = (LOGS / f"{command.name}.log").read_text(errors="replace")
        found = re.search(r"^router +starting pid (\d+)$", log, re.MULTILINE)
        yield f"http://127.0.0.1:{port}", int(found[1]) if found else None


async def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Raises ConnectionError, EOFError."""
    url = f"{args.url}/v1/completions"
    target = Target(url, None, {"content-type": "application/json"}, {}, 120.0)
    counts: Counter[str] = Counter()
    times: dict[str, list[float]] = {"alone": [], "beside": []}
    memory: dict[str, list[float | None]] = {"alone": [], "beside": []}
    for _ in range(args.rounds):
        times["alone"] += itl_ms(await measure(target, args.streams, args.seconds, args.slow))
        memory["alone"].append(rss_mib(args.router_pid))
        async with crowded(args.url, args.idle, args.slow, counts):
            times["beside"] += itl_ms(await measure(target, args.streams, args.seconds))
            memory["beside"].append(rss_mib(args.router_pid))
    p50, p99 = (
        {name: float(np.percentile(values, share)) for name, values in times.items()}
        for share in (50, 99)
    )
    return {
        "itl_ms_p50": p50,
        "itl_ms_p99": p99,
        "ratio_p99": p99["beside"] / p99["alone"] if p99["alone"] else None,
        "router_rss_mib": memory,
        "crowd": dict(counts),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.misbehaving", description=__doc__)
    parser.add_argument("--url", help="of a server that runs, without a path; else: our own")
    parser.add_argument("--streams", type=int, default=4, help="streams that are measured")
    parser.add_argument("--idle", type=int, default=1_000, help="connections that are only open")
    parser.add_argument("--slow", type=int, default=8, help="slow senders, and slow readers")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of either kind")
    parser.add_argument("--router-pid", type=int, help="whose memory is shown")
    parser.add_argument("--json", type=Path, default=RESULTS / "misbehaving.json",
                        help="where the figures go (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    stop_cleanly()
    try:
        with contextlib.ExitStack() as stack:
            if args.url is None:
                args.url, args.router_pid = stack.enter_context(deployment())
            figures = asyncio.run(compare(args))
    except KeyboardInterrupt:
        return 130
    except (EOFError, OSError, StartError) as error:
        print(f"misbehaving: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=1))
    args.json.write_text(json.dumps(machine.provenance() | figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
