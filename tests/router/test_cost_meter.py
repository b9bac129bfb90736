"""What a router takes its workers to cost, from what it sees of them."""

import pytest

from common.cost import PRIOR, CostModel, Costs
from common.messages import Load
from router.cost_meter import ENOUGH, TOLD, CostMeter, Peers
from router.fleet import Fleet
from router.request import Attempt
from tests.worker_info import worker_info


def serve(meter: CostMeter, seconds_per_token: float, count: int, start: float = 0.0) -> None:
    now = start
    for i in range(count):
        new = 200 + 300 * (i % 7)
        meter.sent(i, now)
        now += new * seconds_per_token
        meter.computed(i, new, 0, now)
        now += 1.0


def test_a_prompt_in_the_queue_counts_from_the_output_before_its_own() -> None:
    apart, queued = CostMeter(Peers()), CostMeter(Peers())
    serve(apart, 0.0005, 40)
    now = 0.0
    for i in range(40):
        queued.sent(i, now)
    for i in range(40):
        new = 200 + 300 * (i % 7)
        now += new * 0.0005
        queued.computed(i, new, 0, now)
    assert apart.model.prefill(1000) == pytest.approx(0.5, rel=0.05)
    assert queued.model.prefill(1000) == pytest.approx(apart.model.prefill(1000), rel=0.01)


def test_a_worker_is_like_its_peers_until_it_is_clearly_not() -> None:
    peers = Peers()
    meters = [CostMeter(peers) for _ in range(4)]
    for meter in meters[:3]:
        serve(meter, 0.0005, 60)
    serve(meters[3], 0.0025, ENOUGH - 1)
    assert meters[3].model == meters[0].model == peers.fit.model
    for turn in range(1, 80):
        for meter in meters[:3]:
            serve(meter, 0.0005, 7, turn * 1e6)
        if turn % 3 == 0:
            serve(meters[3], 0.0025, 7, turn * 1e6)
    assert meters[0].model == meters[1].model == peers.fit.model
    assert meters[3].model.prefill(1000) == pytest.approx(2.5, rel=0.1)


def test_a_prompt_that_ended_without_output_teaches_nothing() -> None:
    meter = CostMeter(Peers())
    meter.sent("a", 1.0)
    assert meter.waits_for("a")
    meter.dropped("a")
    meter.dropped("a")
    assert not meter.waits_for("a")
    assert meter.model == PRIOR


def test_steps_are_measured_while_nothing_is_prefilled_beside_them() -> None:
    peers = Peers()
    meter = CostMeter(peers)
    now = 5.0
    for batch in (4, 8, 2, 16) * 60:
        meter.stepped(Load(running=batch, kv_tokens=1000 * batch), now)
        now += 0.03 + 0.002 * batch
    meter.stepped(Load(), now)
    assert peers.fit.model.step(8, 8000) == pytest.approx(0.046, rel=0.05)
    learnt = peers.fit.model
    meter.stepped(Load(running=1, kv_tokens=5), now + 9.0)
    meter.stepped(Load(running=1, kv_tokens=5, prefill_tokens=700), now + 99.0)
    meter.stepped(Load(running=1, kv_tokens=5), now + 999.0)
    assert peers.fit.model == learnt


def test_the_fleet_measures_its_prefill_workers() -> None:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    for id in ("p0", "p1"):
        fleet.up(worker_info(id, role="prefill"))
    fleet.up(worker_info("d", role="decode"))
    for number in range(60):
        attempt = Attempt(
            number=number,
            choices=(0,),
            prefill=f"p{number % 2}",
            decode="d",
            prefill_tokens=100 * (1 + number % 5),
            kv_tokens=600,
            first=True,
        )
        fleet.reserve(attempt)
        now += 0.02 * attempt.prefill_tokens
        if number % 10 != 9:
            fleet.prefilled(attempt)
        fleet.release(attempt)
    costs = {candidate.id: candidate.cost for candidate in fleet.snapshot()}
    assert costs["p0"] == costs["p1"]
    assert costs["p0"].prefill(300, 300) == pytest.approx(6.0, rel=0.1)
    # What prompts cost on a decode worker: what they cost elsewhere, until it says so itself.
    assert costs["d"].prefill(300, 300) == costs["p0"].prefill(300, 300)
    assert costs["d"].step(4, 100) == PRIOR.step(4, 100)
    said = CostModel(prefill_s=0.5, token_s=1e-3, pair_s=1e-12, step_s=0.2, row_s=1e-3, kv_s=1e-9)
    fleet["d"].meter.told(Costs(model=said, num_prefills=TOLD - 1, num_steps=TOLD - 1))
    assert {candidate.id: candidate.cost for candidate in fleet.snapshot()} == costs
    fleet["d"].meter.told(Costs(model=said, num_prefills=TOLD, num_steps=TOLD))
    assert fleet["d"].candidate().cost == said


def test_a_router_that_just_started_places_upon_what_workers_say() -> None:
    fleet = Fleet()
    fleet.up(worker_info("p", role="prefill"))
    said = CostModel(prefill_s=0.5, token_s=1e-3, pair_s=1e-12, step_s=0.2, row_s=1e-3, kv_s=1e-9)
    fleet["p"].meter.told(Costs(model=said, num_prefills=50))
    assert fleet["p"].candidate().cost.prefill(100) == pytest.approx(said.prefill(100))
    # From then on by what it sees itself.
    serve(fleet["p"].meter, 0.0005, 60)
    fleet["p"].meter.told(Costs(model=said, num_prefills=99))
    assert fleet["p"].candidate().cost.prefill(1000) == pytest.approx(0.5, rel=0.05)
