"""Whole simulated deployments: what small ones must come to, and what always holds."""

from collections.abc import Sequence

import pytest

from common.blockhash import BlockHash
from router.simulate import trace
from router.simulate.cluster import Cluster
from router.simulate.experiment import Experiment, search
from router.simulate.failures import Failure
from router.simulate.job import Job
from router.simulate.model import Hardware
from router.simulate.outcome import summarize
from router.simulate.policies import POLICIES, policy
from router.simulate.search import goodput
from router.simulate.slo import Slo
from router.simulate.trace import Request
from router.slo import Limit

HARDWARE = Hardware(prefill_s=0.0, token_s=1e-3, pair_s=0.0, block_tokens=100, prefill_blocks=50)
SLO = Slo(Limit(2.0, 1.5), 0.05)


def request(at: float, prompt: int, output: int, *blocks: int) -> Request:
    return Request(at, prompt, output, tuple(BlockHash(bytes([b])) for b in blocks))


def run(name: str, requests: Sequence[Request], prefill: int = 1) -> list[Job]:
    cluster = Cluster(HARDWARE, prefill, 1, policy(name))
    return cluster.run(requests, [r.arrival for r in requests])


def firsts(jobs: Sequence[Job]) -> list[float]:
    return [job.first for job in jobs if job.first is not None]


def test_prompts_queue_and_reuse_what_is_cached() -> None:
    requests = [
        request(0.0, 1000, 1, *range(10)),
        request(0.1, 1000, 1, *range(5), *range(20, 25)),
        request(0.2, 1000, 1, *range(10)),
    ]
    for name in ("min-ttft", "pooled"):
        jobs = run(name, requests)
        assert firsts(jobs) == pytest.approx([1.0, 1.5, 1.501])
        assert [job.cached for job in jobs] == [0, 500, 999]


def test_conductor_fetches_what_a_busy_worker_holds() -> None:
    requests = [
        request(0.0, 1000, 1, *range(10)),
        request(2.0, 4000, 1, *range(40, 80)),
        request(2.1, 1000, 1, *range(10)),
        request(2.2, 2000, 1, *range(10), *range(90, 100)),
    ]
    jobs = run("conductor", requests, prefill=2)
    assert jobs[1].prefill != jobs[2].prefill
    assert sum(job.cached for job in jobs) == 999 + 1000
    plain = run("min-ttft", requests, prefill=2)
    assert max(firsts(jobs)) <= max(firsts(plain))


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("staleness", [0.0, 5.0])
def test_every_policy_serves_all_of_a_load(name: str, staleness: float) -> None:
    requests = trace.load("synthetic:requests=150,rate=8,input=8000")
    cluster = Cluster(Hardware(), 3, 2, policy(name), staleness_s=staleness, itl_s=0.05)
    jobs = cluster.run(requests, [r.arrival for r in requests])
    for job in jobs:
        assert job.first is not None and job.end is not None
        assert job.arrival < job.first <= job.end
        assert 0 <= job.cached < job.request.prompt
    result = summarize(jobs, Hardware(), SLO)
    assert result.ttft_p50 <= result.ttft_p99
    assert 0 < result.hit < 1


@pytest.mark.parametrize("name", ["tandem", "conductor", "random"])
def test_failures_lose_no_request(name: str) -> None:
    requests = trace.load("synthetic:requests=150,rate=12,input=8000")
    broken = (Failure("p0", 4.0, 3.0), Failure("d1", 6.0, 0.0), Failure("p1", 5.0, 0.5))
    cluster = Cluster(Hardware(), 2, 2, policy(name), failures=broken, itl_s=0.05)
    jobs = cluster.run(requests, [r.arrival for r in requests])
    assert all(job.end is not None for job in jobs)
    calm = Cluster(Hardware(), 2, 2, policy(name), itl_s=0.05)
    undisturbed = calm.run(requests, [r.arrival for r in requests])
    assert summarize(jobs, Hardware(), SLO).ttft_mean > (
        summarize(undisturbed, Hardware(), SLO).ttft_mean
    )


def experiment(name: str) -> Experiment:
    requests = trace.load("synthetic:requests=300,rate=4,input=6000")
    return Experiment(
        requests=requests, hardware=Hardware(), num_prefill=2, num_decode=1, policy=name, slo=SLO
    )


def test_what_comes_while_caches_are_cold_does_not_count() -> None:
    requests = [
        request(0.0, 3000, 1, *range(30)),
        request(0.0, 3000, 1, *range(30)),
        request(20.0, 1000, 1, *range(10)),
        request(30.0, 1000, 1, *range(10)),
    ]
    jobs = run("min-ttft", requests)
    tight = Slo(Limit(0.5, 0.0), 0.05)
    cold, warm = summarize(jobs, HARDWARE, tight), summarize(jobs, HARDWARE, tight, 0.5)
    assert (cold.attainment, warm.attainment) == (0.5, 1.0)
    assert warm.rate == cold.rate == 4 / 30
    assert cold.hit == (2999 + 999 + 999) / 8000 and warm.hit == 999 / 1000
    assert warm.ttft_p99 == pytest.approx(0.001)


def test_equal_seeds_give_equal_runs() -> None:
    assert experiment("tandem").outcome(2.0) == experiment("tandem").outcome(2.0)


def test_search_finds_the_rates_and_ours_bears_more() -> None:
    found = {name: search(experiment(name), 1.0) for name in ("tandem", "least-tokens")}
    for result in found.values():
        assert 0 < result.g99 <= result.g90
        rates = [outcome.rate for outcome in result.outcomes]
        assert rates == sorted(rates)
    assert found["tandem"].g99 > 1.05 * found["least-tokens"].g99


@pytest.mark.parametrize("start", [0.01, 3.0, 900.0])
def test_goodput_is_found_from_anywhere(start: float) -> None:
    found = goodput(lambda rate: 1.0 if rate <= 7.0 else 0.0, 0.9, start)
    assert 7.0 / 1.01 <= found <= 7.0
    assert goodput(lambda rate: 0.0, 0.9, start) == 0.0
    asked: list[float] = []

    def never(rate: float) -> float:
        asked.append(rate)
        return 0.0

    assert goodput(never, 0.9, start, least=start / 8) == 0.0
    assert min(asked) == start / 16
