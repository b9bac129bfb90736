"""The measuring of `tandem bench sweep`: every contender at every rate, in turns.

Called by `benchmarks.sweep`. All contenders get the same requests at the same moments.
"""

import argparse
import asyncio
import copy
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import contenders, load, machine, stats
from benchmarks.client import Target
from benchmarks.compare.server import StartError, free_ports, running
from benchmarks.contenders import Contender
from benchmarks.run import Plan, run

BUSY = 0.1
"""Share of the machine in use before anything starts, above which a result is doubtful."""
PROBE_REQUESTS, PROBE_STREAMS = 24, 8
"""Closed loop on the first contender that finds the rates of `--rates auto`."""
AUTO_SHARES = (0.15, 0.3, 0.5, 0.7, 0.9, 1.1)
"""Rates of `--rates auto`, as shares of the throughput that the probe found."""
SEEDS_PER_REPEAT = 1000


def point_arguments(args: argparse.Namespace, rate: float) -> argparse.Namespace:
    """What `benchmarks.load` needs for one point; an infinite rate is the probe."""
    point = copy.copy(args)
    point.request_rate, point.burst_size, point.max_seconds = rate, 0, 0.0
    if math.isinf(rate):
        point.num_prompts, point.max_concurrency = PROBE_REQUESTS, PROBE_STREAMS
    else:
        point.num_prompts = max(args.min_prompts, math.ceil(rate * args.point_seconds))
    return point


def point_plan(args: argparse.Namespace, rate: float, seed: int) -> Plan:
    """The requests of one point. A trace keeps its bursts: its clock is scaled to the rate.

    Raises ValueError, OSError.
    """
    plan = load.plan(point_arguments(args, rate), seed)
    due = list(plan.due)
    if math.isinf(rate):
        due = [-math.inf] * len(due)
    elif args.dataset_name == "trace" and due[-1] > 0:
        due = [t * (len(due) - 1) / rate / due[-1] for t in due]
    limit = max(0.0, due[-1]) + args.grace
    return dataclasses.replace(plan, due=due, max_seconds=limit)


def measure(
    args: argparse.Namespace, target: Target, rate: float, seed: int, slo: Mapping[str, float]
) -> dict[str, Any]:
    """The figures of one point. Raises ConnectionError if the server does not answer."""
    result = asyncio.run(run(target, point_plan(args, rate, seed), progress=False))
    return stats.summarize(result, dict(slo))


@contextmanager
def serving(
    contender: Contender, cores: Sequence[int], logs: Path, args: argparse.Namespace
) -> Iterator[Target]:
    """Where a contender answers, for as long as this is held. Raises StartError."""
    if not contender.started:
        yield load.target(args, contender.url, contender.model)
        return
    (port,) = free_ports(1)
    command = contenders.up_command(contender, port, cores, args.model, args.up_flags)
    with running([command], logs, args.start_timeout):
        yield load.target(args, f"http://127.0.0.1:{port}", None)


@contextmanager
def beside(cores: Sequence[int]) -> Iterator[None]:
    """Keep the load client off the cores of the servers, if there are others."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, usable - set(cores) or usable)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def auto_rates(
    first: Contender, cores: Sequence[int], logs: Path, args: argparse.Namespace
) -> list[float]:
    """Rates around what the first contender can do. Raises StartError, ConnectionError."""
    with serving(first, cores, logs, args) as target:
        figures = measure(args, target, math.inf, SEEDS_PER_REPEAT - 1, {})
    most = figures["request_throughput"]
    if not most:
        raise ConnectionError(f"{first.name} answered no request of the probe")
    digits = 1 - math.floor(math.log10(most * AUTO_SHARES[0]))
    rates = sorted({round(most * share, digits) for share in AUTO_SHARES})
    print(f"{first.name} answers {most:.2f} requests/s in a closed loop: rates {rates}", flush=True)
    return rates


def turn(
    contender: Contender, target: Target, rates: Sequence[float], repeat: int,
    args: argparse.Namespace, slo: Mapping[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """All rates on one contender. Raises ConnectionError."""
    points = []
    for number, rate in enumerate(rates):
        figures = measure(args, target, rate, repeat * SEEDS_PER_REPEAT + number, slo)
        points.append(
            {"contender": contender.name, "rate": rate, "repeat": repeat, "figures": figures}
        )
        misses = figures["errors"] + figures["rejected"]
        times = (figures[f"{args.percentile}_{name}_ms"] for name in ("ttft", "tpot"))
        ttft, tpot = (math.nan if time is None else time for time in times)
        print(
            f"#{repeat + 1} {contender.name:<14}{rate:>8g}/s  within SLOs "
            f"{figures['slo_attainment']:>4.0%}  TTFT {ttft:.0f} ms, TPOT "
            f"{tpot:.1f} ms" + (f"  {misses} failed" if misses else ""),
            flush=True,
        )
    return points


def sweep(
    args: argparse.Namespace, found: Sequence[Contender], rates: Sequence[float],
    cores: Sequence[int], slo: Mapping[str, float], directory: Path,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything; the document that `--render` reads. No rates: by a probe. Ctrl-C ends it
    early; what was measured is kept after each turn. Raises StartError, ConnectionError if the
    probe fails."""
    busy = machine.busy_share()
    logs = directory / "logs"
    document: dict[str, Any] = machine.provenance() | {
        "busy_share": busy, "slo": dict(slo), "attainment": args.attainment,
        "percentile": args.percentile, "unit": args.unit, "seed": args.seed,
        "load": description(args), "contenders": [c.to_json() for c in found], "failures": [],
    }  # fmt: skip
    if busy > BUSY:
        print(f"The machine is {busy:.0%} busy already: figures are doubtful.")
    points: list[dict[str, Any]] = []
    with beside(cores):
        rates = rates or auto_rates(found[0], cores, logs, args)
        for repeat, contender in itertools.product(range(args.repeats), found):
            try:
                with serving(contender, cores, logs, args) as target:
                    points += turn(contender, target, rates, repeat, args, slo)
            except (StartError, ConnectionError) as error:
                print(f"{contender.name}: {error}", flush=True)
                document["failures"].append(f"{contender.name}: {str(error).splitlines()[0]}")
            except KeyboardInterrupt:
                document["failures"].append("stopped before its end")
                break
            finally:
                keep(document | {"points": points}, directory)
    return document | {"points": points}


def keep(document: Mapping[str, Any], directory: Path) -> None:
    """Write what is measured so far, for `--render`; all at once, so that a kill leaves a whole."""
    unfinished = directory / "sweep.json.unfinished"
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.rename(directory / "sweep.json")


def description(args: argparse.Namespace) -> str:
    """The load in words."""
    fields = {
        "random": ("random_input_len", "random_output_len", "random_prefix_len"),
        "prefix_repetition": (
            "prefix_repetition_prefix_len", "prefix_repetition_suffix_len",
            "prefix_repetition_num_prefixes", "prefix_repetition_output_len",
        ),
        "conversation": ("conversation_turns", "random_input_len", "random_output_len"),
        "trace": ("trace_length_scale", "trace_max_input_len", "trace_max_output_len"),
    }[args.dataset_name]  # fmt: skip
    settings = ", ".join(
        f"{f.removeprefix(args.dataset_name + '_').replace('_', ' ')} {getattr(args, f):g}"
        for f in fields
        if getattr(args, f)
    )
    return f"{args.dataset_name}: {settings}; {args.point_seconds:g} s per point"
