"""Load as the router knows it: what it placed counts at once and until the end."""

import pytest

from common.messages import Load
from router.fleet import FULL, Carried, Fleet, Gauge, Limits
from router.health import FAILURES
from router.request import Attempt
from tests.worker_info import worker_info


def test_gauge_counts_what_no_report_can_show_yet() -> None:
    gauge = Gauge()
    gauge.report(100)
    gauge.place(10)
    assert gauge.value == 110
    gauge.report(100)  # may have been on its way when the 10 were placed
    assert gauge.value == 110
    gauge.report(105)
    assert gauge.value == 105
    gauge.report(0)
    assert gauge.value == 10  # it is ours and not over
    gauge.end(10)
    assert gauge.value == 0


def test_gauge_never_goes_below_nothing() -> None:
    with pytest.raises(AssertionError):
        Gauge().end(1)


def attempt(prefill: str | None = "p", decode: str | None = "d") -> Attempt:
    return Attempt(
        number=1,
        choices=(0, 1),
        prefill=prefill,
        decode=decode,
        prefill_tokens=30,
        kv_tokens=50,
        first=True,
    )


def loads(fleet: Fleet) -> dict[str, tuple[int, int, int]]:
    return {
        member.info.id: (
            member.prefill_tokens.value,
            member.kv_tokens.value,
            member.num_seqs.value,
        )
        for member in fleet
    }


def fleet() -> Fleet:
    result = Fleet()
    result.up(worker_info("p", role="prefill"))
    result.up(worker_info("d", role="decode"))
    for member in result:  # nothing counts as just placed
        member.report(Load())
    return result


def settle(fleet: Fleet) -> None:
    """Two reports of an idle worker: only what is ours counts."""
    for member in fleet:
        member.report(Load())
        member.report(Load())


def test_remote_attempt_from_start_to_end() -> None:
    workers, one = fleet(), attempt()
    workers.reserve(one)
    assert loads(workers) == {"p": (30, 0, 2), "d": (0, 50, 2)}
    workers.prefilled(one)
    settle(workers)
    assert loads(workers) == {"p": (0, 0, 2), "d": (0, 50, 2)}
    workers.handed_over(one)
    assert loads(workers) == {"p": (0, 0, 0), "d": (0, 50, 2)}
    workers.release(one)
    assert loads(workers) == {"p": (0, 0, 0), "d": (0, 0, 0)}


@pytest.mark.parametrize(
    ("one", "during"),
    [
        (attempt(prefill=None), {"p": (0, 0, 0), "d": (30, 50, 2)}),
        (attempt(decode=None), {"p": (30, 0, 2), "d": (0, 0, 0)}),
    ],
)
def test_attempt_on_one_worker(one: Attempt, during: dict[str, tuple[int, int, int]]) -> None:
    workers = fleet()
    workers.reserve(one)
    assert loads(workers) == during
    workers.release(one)
    settle(workers)
    assert loads(workers) == {"p": (0, 0, 0), "d": (0, 0, 0)}


def test_attempt_that_outlives_its_prefill_worker() -> None:
    workers, one = fleet(), attempt()
    workers.reserve(one)
    workers.prefilled(one)
    workers.handed_over(one)
    workers.down("p")
    workers.up(worker_info("p", role="prefill", epoch=2))
    workers.release(one)
    settle(workers)
    assert loads(workers) == {"d": (0, 0, 0), "p": (0, 0, 0)}


def test_limits_are_those_of_the_smallest_and_survive_the_last_worker() -> None:
    workers = Fleet(max_model_len=900)
    assert workers.limits is None
    workers.up(worker_info("p", role="prefill", vocab_size=100))
    assert workers.limits is None
    workers.up(worker_info("d", role="decode", num_blocks=50))
    assert workers.limits == Limits(800, 100, (2,))  # 50 blocks of 16 tokens
    workers.up(worker_info("e", role="decode", num_blocks=500))
    assert workers.limits == Limits(900, 100, (2,))
    workers.down("d")
    workers.down("e")
    assert workers.limits == Limits(900, 100, (2,))


def test_who_can_serve() -> None:
    workers = Fleet()
    assert workers.why_not() == "no decode worker is connected"
    workers.up(worker_info("p", role="prefill"))
    assert workers.why_not() == "no decode worker is connected"
    workers.up(worker_info("d", role="decode"))
    assert workers.why_not() is None
    workers["d"].draining = True
    assert workers.why_not() == "all decode workers are leaving"
    workers.up(worker_info("e", role="decode"))
    assert workers.why_not() is None
    workers["e"].progress.hung = True
    assert workers.why_not() == "every decode worker hangs"
    assert {candidate.id for candidate in workers.snapshot() if candidate.ready} == {"p"}


def test_requests_of_the_whole_deployment() -> None:
    workers = fleet()
    assert workers.num_requests() == (0, 0)
    workers["p"].report(Load(running=1, waiting=2))
    workers["d"].report(Load(running=5, waiting=3))
    assert workers.num_requests() == (6, 2)  # the decode worker waits for the other's three
    workers["d"].report(Load(running=5, waiting=7))
    assert workers.num_requests() == (6, 6)


def test_each_of_several_routers_may_fill_its_part_of_the_seats() -> None:
    workers, attempts = Fleet(), [attempt(prefill=None) for _ in range(5)]
    workers.up(worker_info("d", role="decode", max_num_seqs=4))
    seats = FULL * 4
    worker = workers["d"]
    workers.share({"d": Carried(num_seqs=seats)}, 1)
    workers.reserve(attempts[0])  # two sequences each
    assert not worker.full
    workers.reserve(attempts[1])
    assert worker.full
    # With a third router there is less for each.
    workers.release(attempts[1])
    assert not worker.full
    workers.share({"d": Carried(num_seqs=seats)}, 2)
    assert worker.full
    # Whatever the others leave can be used.
    workers.share({"d": Carried(num_seqs=2)}, 1)
    for one in attempts[2:4]:
        assert not worker.full
        workers.reserve(one)
    assert worker.full
    # Alone, it may have all.
    workers.share({}, 0)
    assert not worker.full
    workers.reserve(attempts[4])
    assert worker.full


def test_busy_are_only_workers_that_could_take_the_request() -> None:
    workers = Fleet()
    workers.up(worker_info("d", role="decode", max_num_seqs=1, num_blocks=4))  # 64 tokens
    assert not workers.is_busy(10, None, ()) and workers.has_seats
    workers.reserve(attempt(prefill=None))
    assert workers.is_busy(63, None, ()) and workers.is_busy(63, "c0", {"e"})
    assert not workers.has_seats
    assert not workers.is_busy(64, None, ())
    assert not workers.is_busy(63, "c1", ())
    assert not workers.is_busy(63, None, {"d"})
    workers["d"].draining = True
    assert not workers.is_busy(63, None, ()) and not workers.has_seats


def test_a_worker_that_rests_has_no_seats() -> None:
    workers = Fleet(clock=lambda: 100.0)
    for name in ("d", "e"):
        workers.up(worker_info(name, role="decode", max_num_seqs=1))
    workers.reserve(attempt(prefill=None, decode="e"))
    workers.failed(["d"] * FAILURES)
    workers["e"].report(Load())
    assert workers["e"].full and not workers["d"].full
    assert workers._suspended() == {"d"} and not workers.has_seats
