"""How near does the simulator come to the real system? A trace on both, on this machine.

    python -m benchmarks.simulate_fidelity --trace FILE [--prefill 1 --decode 1] [--json FILE]

A deployment serves the first part of a trace as fast as it can: its workers measure what their
steps cost, and its caches fill. Then it serves further parts at shares of the rate that it reached.
For each of these the simulator is given what was known before: the costs that the workers published
until then, sizes of pools, and the moments at which the requests were sent. Its times and hits are
put beside those that were measured.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import os
import statistics
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import machine
from benchmarks.arrivals import trace_arrivals
from benchmarks.client import Record, Target
from benchmarks.compare.checkpoints import SHAPES, checkpoint
from benchmarks.compare.paths import LOGS
from benchmarks.compare.server import Command, StartError, free_ports, running, stop_cleanly
from benchmarks.datasets import Query, trace_queries
from benchmarks.run import Plan, run
from router.simulate import trace
from router.simulate.cluster import Cluster
from router.simulate.job import Job
from router.simulate.model import Hardware
from router.simulate.policies import policy
from router.simulate.trace import Request
from router.slo import STEP_S

SHAPE: Final = "llama-135m"
BLOCK: Final = 512
"""Tokens of a block of the trace."""
STREAMS: Final = 8
"""Requests in flight while costs are measured."""


def recorded(path: Path, queries: Sequence[Query], block_tokens: int) -> list[Request]:
    """The requests as the simulator knows them: lengths that were sent, blocks of the trace."""
    rows = trace.load(str(path))[: len(queries)]
    return [
        dataclasses.replace(
            row,
            prompt=query.input_len,
            output=query.output_len,
            blocks=row.blocks[: -(-query.input_len // block_tokens)],
        )
        for row, query in zip(rows, queries, strict=True)
    ]


def hardware(workers: Sequence[Mapping[str, Any]], block_tokens: int, link: float) -> Hardware:
    """What workers say of themselves: prompts as prefill workers compute them, steps as decode
    workers make them.

    block_tokens: of a scaled block of the trace. link: bytes/s between workers.
    """
    by_role = {worker["role"]: worker for worker in workers}
    decode = by_role["decode"]
    prefill = by_role.get("prefill", decode)

    def blocks(worker: Mapping[str, Any]) -> int:
        return int(worker["num_blocks"] * worker["block_size"] // block_tokens)

    return Hardware(
        **{name: prefill["costs"][name] for name in ("prefill_s", "token_s", "pair_s")},
        **{name: decode["costs"][name] for name in ("step_s", "row_s", "kv_s")},
        kv_bytes_per_token=decode["token_bytes"],
        link_bytes_per_s=link,
        block_tokens=block_tokens,
        prefill_blocks=blocks(prefill),
        decode_blocks=blocks(decode),
        max_num_seqs=decode["max_num_seqs"],
        chunk_tokens=prefill["max_num_batched_tokens"],
        local_chunk_tokens=decode["max_num_batched_tokens"],
    )


def simulated(
    requests: Sequence[Request],
    sent: Sequence[float],
    costs: Hardware,
    prefill: int,
    decode: int,
    seed: int,
) -> list[Job]:
    """All that was sent until now, at the moments (s) at which it was."""
    cluster = Cluster(costs, prefill, decode, policy("tandem"), seed=seed, itl_s=STEP_S)
    return cluster.run(requests, sent)


def figures(
    ttft: Sequence[float], e2e: Sequence[float], tpot: Sequence[float], hit: float
) -> dict[str, float]:
    """Seconds, and the part of the prompt tokens that was not computed."""
    return {
        "ttft_mean": statistics.mean(ttft),
        "ttft_p50": float(np.quantile(ttft, 0.5)),
        "ttft_p99": float(np.quantile(ttft, 0.99)),
        "tpot_mean": statistics.mean(tpot) if tpot else 0.0,
        "e2e_p50": float(np.quantile(e2e, 0.5)),
        "e2e_p99": float(np.quantile(e2e, 0.99)),
        "hit": hit,
    }


def measured_figures(records: Sequence[Record]) -> dict[str, float]:
    return figures(
        [record.ttft_s for record in records],
        [record.e2e_s for record in records],
        [tpot for record in records if (tpot := record.tpot_s) is not None],
        sum(r.cached_tokens for r in records) / sum(r.input_len for r in records),
    )


def simulated_figures(jobs: Sequence[Job]) -> dict[str, float]:
    times = [(j.arrival, j.first, j.end, j.request.output) for j in jobs]
    done = [(at, f, e, n) for at, f, e, n in times if f is not None and e is not None]
    assert len(done) == len(jobs)
    return figures(
        [first - at for at, first, _, _ in done],
        [end - at for at, _, end, _ in done],
        [(end - first) / (n - 1) for _, first, end, n in done if n > 1],
        sum(j.cached for j in jobs) / sum(j.request.prompt for j in jobs),
    )


async def serve(target: Target, plan: Plan) -> list[Record]:
    """Raises ConnectionError if a request failed."""
    records = (await run(target, plan, progress=False)).records
    for record in records:
        if not record.ok:
            raise ConnectionError(f"a request failed: {record.error}")
    return records


def compare(args: argparse.Namespace, url: str, queries: Sequence[Query]) -> list[dict[str, Any]]:
    """One row per load. Raises ConnectionError, OSError."""
    block = round(BLOCK * args.length_scale)
    requests = recorded(args.trace, queries, block)
    headers = {"content-type": "application/json"}
    target = Target(f"{url}/v1/completions", None, headers, {}, 120.0)
    size = args.requests
    parts = [queries[i : i + size] for i in range(0, len(queries), size)]
    records = asyncio.run(serve(target, Plan(parts[0], [-math.inf] * size, STREAMS)))
    reached = size / (max(r.ended for r in records) - min(r.sent for r in records))
    rows = []
    for number, (load, part) in enumerate(zip(args.loads, parts[1:], strict=True), start=1):
        with urllib.request.urlopen(f"{url}/debug/workers", timeout=10.0) as response:
            workers = json.load(response)["workers"]
        due = trace_arrivals(
            [query.timestamp_ms or 0.0 for query in part], 1.0, np.random.default_rng(args.seed)
        )
        stretch = (size - 1) / due[-1] / (load * reached)
        records += asyncio.run(serve(target, Plan(part, [at / stretch for at in due])))
        begin = records[0].sent
        costs = hardware(workers, block, args.link)
        sent = [record.sent - begin for record in records]
        order = sorted(range(len(sent)), key=sent.__getitem__)
        jobs = simulated(
            [requests[i] for i in order], [sent[i] for i in order], costs,
            args.prefill, args.decode, args.seed,
        )  # fmt: skip
        real = measured_figures(records[number * size :])
        predicted = simulated_figures([job for i, job in zip(order, jobs, strict=True)
                                       if i >= number * size])  # fmt: skip
        rows.append(
            {
                "load": load,
                "rate": load * reached,
                "measured": real,
                "predicted": predicted,
                "error": {k: predicted[k] / real[k] - 1 if real[k] else None for k in real},
                "model": dataclasses.asdict(costs),
            }
        )
        print(f"load {load:g} ({load * reached:.2f} requests/s): measured, predicted, error")
        for name, value in real.items():
            error = rows[-1]["error"][name]
            shown = "-" if error is None else f"{error:+.0%}"
            print(f"  {name:10} {value:9.4f} {predicted[name]:9.4f} {shown:>6}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_fidelity")
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake-format trace")
    parser.add_argument("--model", help=f"checkpoint; none: a random one of the shape {SHAPE}")
    parser.add_argument("--vocab-size", type=int, default=SHAPES[SHAPE].vocab_size)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--requests", type=int, default=60, help="of each part")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--length-scale", type=float, default=1 / 32, help="of the trace's lengths")
    parser.add_argument("--max-input-len", type=int, default=1_500)
    parser.add_argument("--link", type=float, default=4e9, help="bytes/s between workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the results are kept")
    args = parser.parse_args(argv)
    stop_cleanly()
    count = args.requests * (1 + len(args.loads))
    queries = list(
        trace_queries(
            args.trace, args.vocab_size, (args.seed,), length_scale=args.length_scale,
            max_input_len=args.max_input_len, limit=count,
        )
    )  # fmt: skip
    if len(queries) < count:
        parser.error(f"--trace: fewer than {count} requests")
    (port,) = free_ports(1)
    command = Command(
        "fidelity",
        (
            sys.executable, "-m", "deploy.cli", "up", "--port", str(port), "--pin-cores",
            "--model", str(args.model or checkpoint(SHAPE)), "--prefill", str(args.prefill),
            "--decode", str(args.decode), "--device", "cpu", "--kv-memory", "1G",
        ),
        port,
        tuple(sorted(os.sched_getaffinity(0))),
        workers=args.prefill + args.decode,
    )  # fmt: skip
    try:
        with running([command], LOGS, 180.0):
            rows = compare(args, f"http://127.0.0.1:{port}", queries)
    except (StartError, ConnectionError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "prefill": args.prefill, "decode": args.decode, "trace": args.trace.name,
            "requests": args.requests, "length_scale": args.length_scale, "loads": rows,
            "provenance": machine.provenance(),
        }  # fmt: skip
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
