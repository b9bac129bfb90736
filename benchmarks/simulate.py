"""Our placement beside the rules of other routers on recorded traces: simulated, point by point.

    python -m benchmarks.simulate --traces DIRECTORY --points conversation:8 --json FILE

A point is a trace and a number of prefill workers, half as many decode workers beside them. For
each policy: g90 and g99, and the p99 TTFT at the highest rate at which the best of the other
routers still serves 99 % (90 % where none serves 99 % at any rate). A file that has some points and
seeds already gets the others; its summary takes the median over seeds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import provenance
from router.simulate import slo, trace
from router.simulate.experiment import Experiment, search
from router.simulate.model import Hardware

TRACES: Final = {
    "conversation": ("mooncake_conversation", "2s+1.5x", 1.4),
    "toolagent": ("toolagent_like", "2s+1.5x", 2.2),
    "claude-code": ("claude_code_sessions", "3s+0.25x", 0.55),
    "azure-code": ("azure2023_code", "2s+1.5x", 9.0),
}
"""Name: how its file begins, TTFT limit, requests/s per prefill worker from which the search
starts."""

RIVALS: Final = (
    "least-tokens", "sticky", "sglang", "dynamo", "llm-d", "min-ttft", "conductor",
)  # fmt: skip
RATIOS: Final = ("g90_ratio", "g99_ratio", "ttft_p99_ratio")


def measure(
    directory: Path,
    name: str,
    prefill: int,
    part: tuple[float, float],
    seed: int,
    tolerance: float,
    rivals: Sequence[str],
) -> dict[str, Any]:
    """One point. Raises ConfigError for a trace that cannot be read, StopIteration for none."""
    begin, limit, start = TRACES[name]
    path = next(p for p in sorted(directory.iterdir()) if p.name.startswith(begin))
    requests = trace.load(str(path))
    requests = requests[int(part[0] * len(requests)) : int(part[1] * len(requests))]
    native = trace.rate(requests)
    policies = ("tandem", *rivals)

    def experiment(policy: str) -> Experiment:
        return Experiment(
            requests=requests,
            hardware=Hardware(),
            num_prefill=prefill,
            num_decode=max(1, prefill // 2),
            policy=policy,
            slo=slo.parse(limit, "50ms"),
            seed=seed,
        )

    found = {p: search(experiment(p), start * prefill / native, tolerance) for p in policies}
    rate = max(found[p].g99 for p in rivals) or max(found[p].g90 for p in rivals)
    at = {p: experiment(p).outcome(rate / native) for p in policies}
    return {
        "trace": name,
        "file": path.name,
        "part": list(part),
        "prefill": prefill,
        "decode": max(1, prefill // 2),
        "slo": [limit, "50ms"],
        "seed": seed,
        "tolerance": tolerance,
        "rate": rate,
        "policies": {
            p: {
                "g90": found[p].g90,
                "g99": found[p].g99,
                "ttft_p50": at[p].ttft_p50,
                "ttft_p99": at[p].ttft_p99,
                "attainment": at[p].attainment,
                "hit": at[p].hit,
                "local": at[p].local,
            }
            for p in policies
        },
        **ratios({p: (found[p].g90, found[p].g99, at[p].ttft_p99) for p in policies}),
    }


def ratios(values: dict[str, tuple[float, float, float]]) -> dict[str, float | None]:
    """How ours compares with the best of the others, each at what it is best at; above 1: better.
    None where no other has any. `values`: policy -> g90, g99, p99 TTFT."""
    rivals = [value for policy, value in values.items() if policy != "tandem"]
    g90, g99, p99 = values["tandem"]
    best90, best99 = max(v[0] for v in rivals), max(v[1] for v in rivals)
    return {
        "g90_ratio": g90 / best90 if best90 else None,
        "g99_ratio": g99 / best99 if best99 else None,
        "ttft_p99_ratio": min(v[2] for v in rivals) / p99,
    }


def medians(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds of each trace, part and number of workers."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in points:
        key = (point["trace"], tuple(point["part"]), point["prefill"])
        groups.setdefault(key, []).append(point)
    rows = []
    for (name, part, prefill), group in groups.items():
        row = {"trace": name, "part": list(part), "prefill": prefill, "seeds": len(group)}
        for ratio in RATIOS:
            values = [point[ratio] for point in group if point[ratio] is not None]
            row[ratio] = statistics.median(values) if values else None
        rows.append(row)
    return rows


def mean(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Geometric means of the ratios, of those rows that have them."""
    result: dict[str, float | None] = {}
    for name in RATIOS:
        values = [row[name] for row in rows if row[name]]
        result[name] = statistics.geometric_mean(values) if values else None
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="directory of the trace files")
    parser.add_argument("--part", default="0.5:1", help="part of each trace")
    parser.add_argument("--points", nargs="+", default=["conversation:8"], metavar="TRACE:WORKERS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--tolerance", type=float, default=0.02, help="of g90 and g99")
    parser.add_argument("--json", type=Path, required=True, help="where the results are kept")
    args = parser.parse_args(argv)
    start, _, end = args.part.partition(":")
    part = (float(start), float(end))
    kept: dict[str, Any] = {"points": []}
    if args.json.exists():
        kept = json.loads(args.json.read_text())
    there = {(p["trace"], p["prefill"], *p["part"], p["seed"]) for p in kept["points"]}
    for point, seed in ((point, seed) for point in args.points for seed in args.seeds):
        name, _, workers = point.partition(":")
        if (name, int(workers), *part, seed) in there:
            continue
        result = measure(args.traces, name, int(workers), part, seed, args.tolerance, args.rivals)
        kept["points"].append(result)
        kept["summary"] = medians(kept["points"])
        kept |= {"geometric_mean": mean(kept["summary"]), "provenance": provenance()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
        shown = "  ".join(f"{k} {v:.3f}" for k in RATIOS if (v := result[k]) is not None)
        print(f"{name} {workers}P seed {seed}: {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
