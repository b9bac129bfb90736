"""Runs of one policy over one trace: once, or at many rates in search of the highest good one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from router.simulate import trace
from router.simulate.cluster import Cluster
from router.simulate.failures import Failure
from router.simulate.job import Job
from router.simulate.model import Hardware
from router.simulate.outcome import Outcome, summarize
from router.simulate.policies import policy
from router.simulate.search import goodput
from router.simulate.slo import Slo
from router.simulate.trace import Request

WARM_UP: Final = 0.075
"""Part of the requests that come before caches are as full as they are in service."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    requests: Sequence[Request]
    hardware: Hardware
    num_prefill: int
    num_decode: int
    policy: str
    slo: Slo
    seed: int = 0
    staleness_s: float = 0.0
    failures: Sequence[Failure] = ()
    warm_up: float = WARM_UP
    """Part of the requests, from the first on, that is served but does not count."""
    progress: Callable[[], object] = lambda: None
    """Called for each request that arrives."""

    def run(self, rate_scale: float) -> list[Job]:
        cluster = Cluster(
            self.hardware,
            self.num_prefill,
            self.num_decode,
            policy(self.policy),
            seed=self.seed,
            staleness_s=self.staleness_s,
            itl_s=self.slo.tpot_s,
            failures=self.failures,
        )
        times = trace.arrivals(self.requests, rate_scale, Random(self.seed))
        return cluster.run(self.requests, times, self.progress)

    def outcome(self, rate_scale: float) -> Outcome:
        return summarize(self.run(rate_scale), self.hardware, self.slo, self.warm_up)


@dataclass(frozen=True, slots=True)
class Found:
    g90: float
    """Highest rate (requests/s) at which 90 % of the requests meet their limits."""
    g99: float
    outcomes: list[Outcome] = field(default_factory=list)
    """Of every rate that was tried, ascending."""


def search(experiment: Experiment, rate_scale: float, tolerance: float = 0.01) -> Found:
    """g90 and g99 within `tolerance`, from `rate_scale` on; a g99 below a thirtieth of g90 is 0."""
    native = trace.rate(experiment.requests)
    tried: dict[float, Outcome] = {}

    def attainment(rate: float) -> float:
        if rate not in tried:
            tried[rate] = experiment.outcome(rate / native)
        return tried[rate].attainment

    g90 = goodput(attainment, 0.9, native * rate_scale, tolerance)
    good = [rate for rate, outcome in tried.items() if outcome.attainment >= 0.99]
    g99 = goodput(attainment, 0.99, max(good, default=min(tried)), tolerance, g90 / 30)
    # Few requests may meet their limits at a rate above one at which they do not.
    return Found(max(g90, g99), g99, [tried[rate] for rate in sorted(tried)])
