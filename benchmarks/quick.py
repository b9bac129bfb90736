"""`make bench-quick`: is Tandem still as fast as it was? In under 5 minutes, on any machine.

Speeds are told as ratios to a control that runs before and after on the same cores, so that they
can be compared between days. The kept ratios are in benchmarks/results/quick.json.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine
from benchmarks.client import Target
from benchmarks.compare.checkpoints import SHAPES, checkpoint
from benchmarks.compare.loads import OUTPUT, PROMPT, TPOT, Closed, measure
from benchmarks.compare.paths import LOGS, RESULTS, ROOT
from benchmarks.compare.server import StartError, running, stop_cleanly
from benchmarks.compare.systems import MODEL, SYSTEMS

SHAPE = "llama-135m"
PARAMETERS = 134_500_000
"""Of the shape; two operations each per token."""
TOPOLOGIES = ("tandem", "tandem-1p1d")
LOADS = (
    Closed("c1", 1, 4, 128, 48, (TPOT,)),
    Closed("8x32/64", 8, 16, 32, 64, (OUTPUT,)),
    Closed("pf", 2, 6, 1024, 4, (PROMPT,)),
)
KEPT = RESULTS / "quick.json"
TOLERANCE = 0.15
"""A ratio that falls by more than this share is marked."""


def control(cores: Sequence[int]) -> dict[str, float]:
    """Figures of `benchmarks.control` on these cores. Raises CalledProcessError."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare.pinned", ",".join(map(str, cores)),
         sys.executable, "-m", "benchmarks.control", str(checkpoint(SHAPE)),
         "--threads", str(len(cores))],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def tandem(topology: str, cores: Sequence[int]) -> dict[str, float]:
    """One figure per load. Raises StartError, ConnectionError."""
    commands = SYSTEMS[topology].commands(checkpoint(SHAPE), cores)
    url = f"http://127.0.0.1:{commands[-1].port}/v1/completions"
    target = Target(url, MODEL, {"content-type": "application/json"}, {}, 120.0)
    found = {}
    with running(commands, LOGS, 120.0):
        for number, load in enumerate(LOADS):
            figures = asyncio.run(measure(load, target, SHAPES[SHAPE].vocab_size, (number,)))
            found[load.name] = figures[load.columns[0].key]
    return found


def ratios(
    figures: Mapping[str, Mapping[str, float]], control: Mapping[str, float]
) -> dict[str, float]:
    """Figures of each topology as dimensionless ratios to the control; more is better.

    c1 and 8x32/64: tokens per second to those of the transformers loop. pf: operations per second
    of prefill to those of a plain matrix product.
    """
    result = {}
    for topology, found in figures.items():
        result[f"{topology} c1"] = control["decode_ms"] / found["c1"]
        result[f"{topology} 8x32/64"] = found["8x32/64"] * control["decode_ms"] / 1e3
        operations = found["pf"] * 2 * PARAMETERS / 1e9
        result[f"{topology} pf"] = operations / control["gemm_gflop_s"]
    return result


def report(today: Mapping[str, float], kept: Mapping[str, float]) -> str:
    """Today's ratios beside the kept ones, marked where they fell."""
    lines = [f"{'ratio to the control':<24}{'today':>10}{'kept':>10}{'change':>10}"]
    for name, value in today.items():
        before = kept.get(name)
        if before is None:
            lines.append(f"{name:<24}{value:>10.3f}{'-':>10}{'-':>10}")
            continue
        change = value / before - 1
        mark = "  slower" if change < -TOLERANCE else ""
        lines.append(f"{name:<24}{value:>10.3f}{before:>10.3f}{change:>+10.0%}{mark}")
    return "\n".join(lines)


def fell(today: Mapping[str, float], kept: Mapping[str, float]) -> bool:
    return any(
        value < kept[name] * (1 - TOLERANCE) for name, value in today.items() if name in kept
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a ratio fell below the kept one by more than the tolerance, or nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="make today's ratios the kept ones")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    if (busy := machine.busy_share()) > 0.1:
        print(f"The machine is {busy:.0%} busy already: the ratios are doubtful.")
    try:
        before = control(cores)
        figures = {topology: tandem(topology, cores) for topology in TOPOLOGIES}
        after = control(cores)
    except (StartError, ConnectionError, subprocess.CalledProcessError) as error:
        print(f"bench-quick: error: {error}", file=sys.stderr)
        return 1
    means = {name: (before[name] + after[name]) / 2 for name in before}
    today = ratios(figures, means)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {"ratios": {}}
    for name, value in means.items():
        drift = after[name] / before[name] - 1
        print(f"control: {name:<14}{value:>10.2f}   drift {drift:+.0%}")
    print(report(today, kept["ratios"]))
    if args.keep:
        document = machine.provenance() | {
            "busy_share": busy, "control": [before, after], "figures": figures, "ratios": today,
        }  # fmt: skip
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps(document, indent=1) + "\n")
    return int(fell(today, kept["ratios"]) and not args.keep)


if __name__ == "__main__":
    stop_cleanly()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
