"""Is choosing how to prefill ever worse than not to choose? Simulated, over load, prompt, output.

    python -m benchmarks.simulate_modes --json FILE

Two workers each: one prefills and one decodes, and placement may let the latter prefill as well
(adaptive) or not (static); or both decode and prefill for themselves (colocated). Loads are parts
of the highest rate at which the better of the last two serves 90 %.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import provenance
from router.simulate import slo, trace
from router.simulate.experiment import Experiment
from router.simulate.model import Hardware
from router.simulate.search import goodput

MODES: Final = {
    "adaptive": (1, 1, "tandem"),
    "static": (1, 1, "min-ttft"),
    "colocated": (0, 2, "tandem"),
}
"""Name: prefill workers, decode workers, rule."""
LOADS: Final = (0.5, 0.8, 1.0)


def measure(prompt: int, output: int, num_requests: int, seed: int) -> dict[str, Any]:
    """Goodput of all modes at all loads, for exponential lengths of these means."""
    lengths = f"turns=1,shared=0,input={prompt},output={output}"
    requests = trace.load(f"synthetic:requests={num_requests},rate=1,{lengths},seed={seed}")
    native = trace.rate(requests)
    hardware = Hardware()
    experiments = {
        mode: Experiment(
            requests=requests,
            hardware=hardware,
            num_prefill=prefill,
            num_decode=decode,
            policy=rule,
            slo=slo.parse("2s+1.5x", "50ms"),
            seed=seed,
        )
        for mode, (prefill, decode, rule) in MODES.items()
    }

    def highest(mode: str) -> float:
        start = 1.5 / hardware.prefill(prompt, 0)
        return goodput(
            lambda rate: experiments[mode].outcome(rate / native).attainment, 0.9, start, 0.05
        )

    best = max(highest("static"), highest("colocated"))
    rows = []
    for load in LOADS:
        outcomes = {mode: each.outcome(load * best / native) for mode, each in experiments.items()}
        reached = {mode: outcome.goodput for mode, outcome in outcomes.items()}
        better = max(reached["static"], reached["colocated"])
        rows.append(
            {
                "load": load,
                "rate": load * best,
                "goodput": reached,
                "local": outcomes["adaptive"].local,
                "ratio": reached["adaptive"] / better,
                "ratio_to_static": reached["adaptive"] / reached["static"],
            }
        )
    return {"prompt": prompt, "output": output, "seed": seed, "loads": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_modes")
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 2_000, 8_000, 32_000])
    parser.add_argument("--outputs", type=int, nargs="+", default=[10, 100, 1_000])
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the results are kept")
    args = parser.parse_args(argv)
    points = []
    for prompt in args.prompts:
        for output in args.outputs:
            point = measure(prompt, output, args.requests, args.seed)
            points.append(point)
            shown = "  ".join(f"{r['load']}: {r['ratio']:.3f}" for r in point["loads"])
            print(f"prompt {prompt}, output {output}: {shown}", flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {"points": points, "provenance": provenance()}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
