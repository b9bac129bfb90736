"""`tandem simulate`: what a deployment would do under a load, with the router's own placement."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import ConfigError, UsageError
from router.simulate import failures, model, plots, slo, trace
from router.simulate.config import SimulateConfig
from router.simulate.experiment import Experiment, search
from router.simulate.outcome import Outcome, summarize, ttfts
from router.simulate.trace import Request

_COLUMNS = ("rate", "attainment", "goodput", "g90", "g99", "ttft_p50", "ttft_p99", "hit", "local")


def main(config: SimulateConfig) -> int:
    """Simulates, and prints a table; raises ConfigError, UsageError."""
    if config.trace is None:
        raise UsageError("--trace is missing")
    if config.plots is not None:
        plots.check()
    hardware = (
        model.Hardware() if config.model_json is None else model.load(Path(config.model_json))
    )
    limits = slo.parse(config.slo_ttft, config.slo_tpot)
    broken = failures.parse(config.fail, config.prefill, config.decode)
    requests = _part(trace.load(config.trace), config)
    results: list[dict[str, Any]] = []
    drawn: tuple[dict[str, Any], dict[str, list[Outcome]]] = ({}, {})
    for name in config.policies():
        began = time.monotonic()
        with tqdm(
            total=None if config.search else len(requests),
            desc=name,
            unit=" requests",
            leave=False,
            disable=None if config.progress else True,
        ) as bar:
            experiment = Experiment(
                requests=requests,
                hardware=hardware,
                num_prefill=config.prefill,
                num_decode=config.decode,
                policy=name,
                slo=limits,
                seed=config.seed,
                staleness_s=config.staleness_s,
                failures=broken,
                warm_up=config.warm_up,
                progress=bar.update,
            )
            jobs = experiment.run(config.rate_scale)
            outcome = summarize(jobs, hardware, limits, config.warm_up)
            found = search(experiment, config.rate_scale) if config.search else None
        drawn[0][name] = ttfts(jobs[int(config.warm_up * len(jobs)) :])
        drawn[1][name] = [outcome] if found is None else found.outcomes
        results.append(
            {
                "policy": name,
                **dataclasses.asdict(outcome),
                "g90": found.g90 if found else None,
                "g99": found.g99 if found else None,
                "curve": [dataclasses.asdict(o) for o in found.outcomes] if found else [],
                "requests": len(requests),
                "prefill": config.prefill,
                "decode": config.decode,
                "trace": Path(config.trace).name,
                "part": config.part,
                "slo_ttft": config.slo_ttft,
                "slo_tpot": config.slo_tpot,
                "warm_up": config.warm_up,
                "seed": config.seed,
                "seconds": time.monotonic() - began,
            }
        )
    if config.json != "-":
        print(_table(results))
    if config.plots is not None:
        for path in plots.draw(Path(config.plots), *drawn):
            print(f"wrote {path}")
    _write(config.json, results[0] if len(results) == 1 else results)
    return 0


def _part(requests: list[Request], config: SimulateConfig) -> list[Request]:
    start, end = config.bounds()
    part = requests[int(start * len(requests)) : int(end * len(requests))]
    if len(part) < 2 or part[0].arrival == part[-1].arrival:
        raise ConfigError(f"trace {config.trace}: too few requests, or all at one time")
    return part


def _table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'policy':14}" + "".join(f"{name:>12}" for name in _COLUMNS)]
    for result in results:
        cells = ("-" if result[name] is None else f"{result[name]:.4g}" for name in _COLUMNS)
        lines.append(f"{result['policy']:14}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _write(target: str | None, value: Any) -> None:
    """Raises ConfigError if the file cannot be written."""
    if target == "-":
        json.dump(value, sys.stdout)
        print()
    elif target is not None:
        try:
            Path(target).write_text(json.dumps(value, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {error}") from None
