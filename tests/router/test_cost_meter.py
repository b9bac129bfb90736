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
        meter.sent(i, new, now)
        now += new * seconds_per_token
        meter.computed(i, new, 0, now)
        now += 1.0


def attempt(number: int, prefill: str | None = "prefill") -> Attempt:
    return Attempt(
        number=number,
        choices=(0,),
        prefill=prefill,
        decode="decode",
        prefill_tokens=100,
        kv_tokens=600,
        first=True,
    )


def test_a_prompt_in_the_queue_counts_from_the_output_before_its_own() -> None:
    apart, queued = CostMeter(Peers()), CostMeter(Peers())
    serve(apart, 0.0005, 40)
    now = 0.0
    for i in range(40):
        queued.sent(i, 200 + 300 * (i % 7), now)
    for i in range(40):
        new = 200 + 300 * (i % 7)
        now += new * 0.0005
        queued.computed(i, new, 0, now)
    assert apart.model.prefill(1000) == pytest.approx(0.5, rel=0.05)
    assert queued.model.prefill(1000) == pytest.approx(apart.model.prefill(1000), rel=0.01)


def test_a_prompt_that_was_overtaken_teaches_nothing() -> None:
    peers = Peers()
    meter = CostMeter(peers)
    serve(meter, 0.0005, 40)
    learnt, now = peers.fit.num_prefills, 1000.0
    meter.sent("long", 20_000, now)
    for name in ("first", "second"):
        now += 4.0
        meter.sent(name, 200, now)
        now += 0.1
        meter.computed(name, 200, 0, now)
    assert peers.fit.num_prefills == learnt + 2
    now += 2.0
    meter.computed("long", 20_000, 0, now)
    assert peers.fit.num_prefills == learnt + 2 and meter.pace.slowness == pytest.approx(
        1.0, rel=0.01
    )
    meter.sent("next", 1000, now)
    meter.computed("next", 1000, 0, now + 0.5)
    assert peers.fit.num_prefills == learnt + 3
    assert meter.model.prefill(20_000) == pytest.approx(10.0, rel=0.05)


def test_whom_later_prompts_overtake() -> None:
    meter = CostMeter(Peers())
    assert meter.queue(1.0) == []
    meter.sent("long", 10_000, 0.0)
    meter.sent("short", 100, 0.1)
    # In 0.2 s it computes at most 2,000 tokens; the long one is older by as many.
    (long, short) = meter.queue(0.2)
    assert (long.tokens, short.tokens) == (10_000, 100)
    assert long.after == pytest.approx(10_000 - 2 * 2_000)
    assert short.after == pytest.approx(100 - 2 * 1_000)
    meter.computed("short", 100, 0, 0.3)
    assert [queued.tokens for queued in meter.queue(0.3)] == [10_000]


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
    meter.sent("a", 100, 1.0)
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
        meter.stepped(Load(running=batch, kv_tokens=1000 * batch), now, follows=True)
        now += 0.03 + 0.002 * batch
    meter.stepped(Load(), now, follows=True)
    assert peers.fit.model.step(8, 8000) == pytest.approx(0.046, rel=0.05)
    learnt = peers.fit.model
    meter.stepped(Load(running=1, kv_tokens=5), now + 9.0, follows=True)
    meter.stepped(Load(running=1, kv_tokens=5, prefill_tokens=700), now + 99.0, follows=True)
    meter.stepped(Load(running=1, kv_tokens=5), now + 999.0, follows=True)
    assert peers.fit.model == learnt


def test_messages_of_several_steps_that_are_read_together() -> None:
    peers = Peers()
    meter = CostMeter(peers)
    now = 5.0
    for number in range(4_000):
        # A router that is busy for the time of four steps now and then.
        now += 0.01194 if number % 4 == 0 else 0.00002
        load = Load(running=1 + number // 40 % 2, kv_tokens=150)
        meter.stepped(load, now, follows=True)
    assert peers.fit.num_steps > 100
    for batch in (1, 2):
        assert peers.fit.model.step(batch, 150) == pytest.approx(0.003, rel=0.15)
    assert meter.pace.slowness == pytest.approx(1.0, rel=0.15)


def test_a_pause_in_which_a_worker_serves_other_routers_is_no_step() -> None:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    for role in ("prefill", "decode"):
        fleet.up(worker_info(role, role=role))
    worker, load = fleet["decode"], Load(running=5, kv_tokens=100)

    def step() -> None:
        worker.meter.stepped(load, now, follows=bool(worker.streams))

    fleet.reserve(attempt(0))  # its prompt is computed all the time
    for number in range(1, 60):
        one = attempt(number, "prefill" if number % 2 else None)
        fleet.reserve(one)
        now += 9.0
        step()
        fleet.prefilled(one)
        if one.prefill is not None:
            fleet.handed_over(one)
        for _ in range(3):
            now += 0.05
            step()
        fleet.release(one)
        if number % 3:  # the worker heard of the end too late
            now += 0.05
            step()
    assert worker.meter.model.step(5, 100) == pytest.approx(0.05, rel=0.01)
    pace = worker.meter.pace
    assert pace.slowness == pytest.approx(1.0, rel=0.01) and pace.seen == 59 * 3 - ENOUGH


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
    assert fleet["d"].candidate(now).cost == said


def test_a_router_that_just_started_places_upon_what_workers_say() -> None:
    fleet = Fleet()
    fleet.up(worker_info("p", role="prefill"))
    said = CostModel(prefill_s=0.5, token_s=1e-3, pair_s=1e-12, step_s=0.2, row_s=1e-3, kv_s=1e-9)
    fleet["p"].meter.told(Costs(model=said, num_prefills=50))
    assert fleet["p"].candidate(0.0).cost.prefill(100) == pytest.approx(said.prefill(100))
    # From then on by what it sees itself.
    serve(fleet["p"].meter, 0.0005, 60)
    fleet["p"].meter.told(Costs(model=said, num_prefills=99))
    assert fleet["p"].candidate(0.0).cost.prefill(1000) == pytest.approx(0.5, rel=0.05)
