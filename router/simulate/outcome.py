"""What a simulated run came to, in the numbers that a comparison needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.simulate.job import Job
from router.simulate.model import Hardware
from router.simulate.slo import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    rate: float
    """Requests per second that were offered."""
    attainment: float
    """Part of the requests that met both limits; what never ended has not."""
    goodput: float
    """Requests per second that met both limits."""
    hit: float
    """Part of the prompt tokens that was not computed."""
    local: float
    """Part of the prompts that a decode worker computed."""
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float


def ttfts(jobs: Sequence[Job]) -> np.ndarray:
    """Seconds from arrival to the first token, float64 [jobs]; infinite where none came."""
    return np.array([j.first - j.arrival if j.first is not None else np.inf for j in jobs])


def tpots(jobs: Sequence[Job]) -> np.ndarray:
    """Seconds per output token after the first, float64 [jobs]; 0 where there is none."""
    return np.array(
        [
            (j.end - j.first) / max(1, j.request.output - 1)
            if j.end is not None and j.first is not None
            else np.inf
            for j in jobs
        ]
    )


def summarize(jobs: Sequence[Job], hardware: Hardware, slo: Slo, warm_up: float = 0.0) -> Outcome:
    """What all but the first `warm_up` of the jobs (0 to 1) came to; the rate is that of all."""
    span = jobs[-1].arrival - jobs[0].arrival
    rate = len(jobs) / span if span > 0 else float("inf")
    jobs = jobs[int(warm_up * len(jobs)) :]
    first, per_token = ttfts(jobs), tpots(jobs)
    limits = np.array([slo.ttft(hardware.prefill(j.request.prompt, 0)) for j in jobs])
    good = float(np.mean((first <= limits) & (per_token <= slo.tpot_s)))
    return Outcome(
        rate=rate,
        attainment=good,
        goodput=rate * good,
        hit=sum(j.cached for j in jobs) / sum(j.request.prompt for j in jobs),
        local=sum(j.prefill is None for j in jobs) / len(jobs),
        ttft_mean=float(first.mean()),
        ttft_p50=float(np.quantile(first, 0.5)),
        ttft_p90=float(np.quantile(first, 0.9)),
        ttft_p99=float(np.quantile(first, 0.99)),
        tpot_mean=float(per_token.mean()),
        tpot_p99=float(np.quantile(per_token, 0.99)),
    )
