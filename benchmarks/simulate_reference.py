"""Do the simulated rules of other routers come to the figures that are known for them?

    python -m benchmarks.simulate_reference --trace FILE [--json FILE]

The figures are of the whole Mooncake conversation trace on 8 prefill and 4 decode workers. FILE may
be its first part: it is extended to the length of the whole with its last third, whose new blocks
get new names, at the rate that the whole trace has there. That keeps lengths, reuse and the cold
start as they are, as well as a part can tell them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import provenance
from common.blockhash import BlockHash
from router.simulate import slo, trace
from router.simulate.experiment import Experiment, search
from router.simulate.model import Hardware
from router.simulate.trace import Request

REFERENCE: Final[dict[str, tuple[float, float, float, float, float]]] = {
    "random": (3.8, 0.6, 0.11, 82.0, 181.0),
    "least-tokens": (9.9, 8.0, 0.11, 75.0, 128.0),
    "sticky": (13.1, 2.4, 0.37, 1.31, 10.1),
    "sglang": (12.1, 1.5, 0.36, 1.59, 11.5),
    "dynamo": (11.8, 9.8, 0.25, 2.91, 13.4),
    "llm-d": (13.1, 1.3, 0.37, 1.31, 10.6),
    "min-ttft": (12.4, 10.7, 0.29, 1.63, 8.8),
    "conductor": (13.8, 12.6, 0.36, 0.85, 6.2),
    "pooled": (14.1, 12.8, 0.37, 0.78, 6.1),
}
"""Rule: g90, g99, and at `RATE` the hit rate, mean and p99 of TTFT in seconds."""
COLUMNS: Final = ("g90", "g99", "hit", "ttft_mean", "ttft_p99")
RATE: Final = 12.86
WHOLE: Final = 12_031
"""Requests of the whole trace."""
LATER_RATE: Final = 3.66
"""Requests per second of what follows its first 60 %."""
TICK_S: Final = 3.0


def extend(requests: Sequence[Request], total: int = WHOLE) -> list[Request]:
    """`requests` and, up to `total`, the last 30 % of them again and again: blocks that appeared
    there first are new each time, older ones are the same."""
    start = int(0.7 * len(requests))
    old = {name for request in requests[:start] for name in request.blocks}
    tail = requests[start:]
    span = tail[-1].arrival - tail[0].arrival + TICK_S
    stretch = len(tail) / span / LATER_RATE
    result = list(requests)
    at, copy = requests[-1].arrival + TICK_S, 0
    while len(result) < total:
        copy += 1
        suffix = copy.to_bytes(4, "little")
        for request in tail[: total - len(result)]:
            blocks = tuple(
                name if name in old else BlockHash(name[:12] + suffix) for name in request.blocks
            )
            arrival = at + round((request.arrival - tail[0].arrival) * stretch / TICK_S) * TICK_S
            result.append(dataclasses.replace(request, arrival=arrival, blocks=blocks))
        at += round(span * stretch / TICK_S) * TICK_S
    return result


def measure(
    requests: Sequence[Request], rule: str, tolerance: float = 0.02, seed: int = 0
) -> dict[str, float]:
    """What `COLUMNS` names."""
    experiment = Experiment(
        requests=requests,
        hardware=Hardware(),
        num_prefill=8,
        num_decode=4,
        policy=rule,
        slo=slo.parse("2s+1.5x", "50ms"),
        seed=seed,
    )
    native = trace.rate(requests)
    found = search(experiment, 9 / native, tolerance)
    at = experiment.outcome(RATE / native)
    values = (found.g90, found.g99, at.hit, at.ttft_mean, at.ttft_p99)
    return dict(zip(COLUMNS, values, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_reference")
    parser.add_argument("--trace", required=True, help="the conversation trace or its first part")
    parser.add_argument("--rules", nargs="+", default=list(REFERENCE), choices=REFERENCE)
    parser.add_argument("--requests", type=int, default=WHOLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the results are kept")
    args = parser.parse_args(argv)
    requests = extend(trace.load(args.trace), args.requests)
    rows: dict[str, Any] = {}
    for rule in args.rules:
        values = measure(requests, rule, seed=args.seed)
        known = dict(zip(COLUMNS, REFERENCE[rule], strict=True))
        ratios = {name: values[name] / known[name] for name in COLUMNS}
        rows[rule] = {"values": values, "reference": known, "ratio": ratios}
        shown = "  ".join(f"{c} {values[c]:.3g} ({ratios[c]:.2f})" for c in COLUMNS)
        print(f"{rule:13} {shown}", flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {"requests": len(requests), "rules": rows, "provenance": provenance()}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
