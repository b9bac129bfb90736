"""Failures that come together: several choices, several workers, more than the router may hold."""

import asyncio

import pytest

from common.messages import Admit, Cancel, Failed, Prefill
from router.dispatch import Patience
from router.waiting import Bounds
from tests.client import Answer, complete, stream
from tests.router.conftest import Deploy
from tests.router.deployment import Deployment, until
from tests.router.stub_worker import StubWorker, expected
from tests.router.test_recovery import PROMPT, carrier, idle


async def spread(served: Deployment, n: int) -> tuple[asyncio.Task[object], list[StubWorker]]:
    """A stream whose `n` choices went on, each for itself, after their worker was lost."""
    for worker in served.decodes:
        worker.ends_at = 5
    asked: asyncio.Task[object] = asyncio.create_task(
        stream(served.http, PROMPT, seed=5, max_tokens=50, n=n)
    )
    await until(lambda: any(worker.steps == 5 for worker in served.decodes))
    victim = carrier(served.decodes)
    others = [worker for worker in served.decodes if worker is not victim]
    for worker in others:
        worker.gate.clear()
    await victim.kill()
    await until(lambda: sum(worker.num_running for worker in others) == n)
    return asked, others


async def test_request_that_fails_in_mid_replacement_ends_alone(deploy: Deploy) -> None:
    patience = Patience(max_resumes=1, grace_s=0.3, resume_s=3.0)
    async with deploy(prefill=0, decode=2, patience=patience) as served:
        asked, (other,) = await spread(served, 4)
        await other.kill()  # four attempts at once; the first of them is one failure too many
        answer = await stream_of(asked)
        assert answer.error is not None and answer.error["code"] == "unavailable"
        await served.add("decode", "decode-new")
        assert (await complete(served.http, PROMPT, seed=6)).ids == expected(PROMPT, 16, seed=6)
        await idle(served)


async def test_choices_that_fail_together_are_one_failure(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=3, patience=Patience(max_resumes=3)) as served:
        asked, others = await spread(served, 3)
        for worker in others:
            worker.give_up("reset")
        await until(lambda: sum(worker.num_running for worker in others) == 3)
        for worker in others:
            worker.go_on()
        answer = await stream_of(asked)
        assert answer.error is None
        for choice in range(3):
            assert answer.tokens[choice] == expected(PROMPT, 50, seed=5, choice=choice)
        assert served.value("resumes_total", cause="reset") == 3
        await idle(served)


async def stream_of(asked: "asyncio.Task[object]") -> Answer:
    answer = await asked
    assert isinstance(answer, Answer)
    return answer


async def test_what_finds_no_place_in_the_queue_leaves_nothing_behind(deploy: Deploy) -> None:
    patience, bounds = Patience(resume_s=0.5), Bounds(count=8)
    async with deploy(prefill=0, patience=patience, bounds=bounds) as served:
        worker = served.decodes[0]
        worker.gate.clear()
        asked = [
            asyncio.create_task(stream(served.http, PROMPT, seed=5, max_tokens=50, n=6))
            for _ in range(2)
        ]
        await until(lambda: worker.num_running == 12)
        worker.ends_at = worker.steps + 3
        worker.gate.set()
        await until(lambda: not worker.gate.is_set())
        await worker.kill()
        answers = await asyncio.gather(*asked)
        assert all(answer.error is not None for answer in answers)
        assert served.value("waiting_requests") == 0
        late = await served.add("decode", "decode-new")
        assert (await complete(served.http, PROMPT)).status == 200
        assert len(late.received(Admit)) == 1
        await idle(served)


@pytest.mark.parametrize("waits", [False, True])
async def test_request_that_cannot_be_sent_fails_alone(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    async with deploy(prefill=0, decode=0 if waits else 1, patience=Patience(grace_s=20)) as served:
        send = served.service._link.send

        def send_or_trip(worker: str, message: object) -> None:
            if isinstance(message, Admit) and message.params.seed == 13:
                raise OverflowError("too large for the message")
            send(worker, message)  # type: ignore[arg-type]

        monkeypatch.setattr(served.service._link, "send", send_or_trip)
        if waits:  # limits are known from a worker that was there
            await (await served.add("decode", "first")).kill()
            await until(lambda: "first" not in served.service.fleet)
        bad = asyncio.create_task(complete(served.http, PROMPT, seed=13))
        if waits:
            await until(lambda: served.value("waiting_requests") == 1)
            good = asyncio.create_task(complete(served.http, PROMPT, seed=14))
            await until(lambda: served.value("waiting_requests") == 2)
            await served.add("decode", "second")
            assert (await good).ids == expected(PROMPT, 16, seed=14)
        answer = await bad
        assert (answer.status, answer.error and answer.error["code"]) == (500, "internal_error")
        assert (await complete(served.http, PROMPT, seed=15)).status == 200
        assert served.value("waiting_requests") == 0
        await idle(served)


@pytest.mark.parametrize("split", [False, True])
async def test_stop_string_ends_the_work_for_its_choice(deploy: Deploy, split: bool) -> None:
    async with deploy(prefill=1 if split else 0) as served:
        worker = served.decodes[0]
        tokens = [expected(PROMPT, 60, seed=1, choice=choice) for choice in range(2)]
        first, second = (served.text_model.decode(ids) for ids in tokens)
        stop = next(
            text
            for start in range(4, len(first) - 6)
            if (text := first[start : start + 6]).isascii() and text not in second
        )
        worker.ends_at = 50
        asked = asyncio.create_task(
            complete(served.http, PROMPT, seed=1, max_tokens=60, n=2, stop=[stop])
        )
        await until(lambda: worker.num_running == 1 and bool(worker.received(Cancel)))
        (cancel,) = worker.received(Cancel)
        assert cancel.choices == (0,)
        worker.go_on()
        answer = await asked
        assert answer.finish == {0: "stop", 1: "length"}
        assert answer.tokens[1] == tokens[1]
        # The other one ended by itself: nothing more is to be said.
        assert worker.received(Cancel) == [cancel]
        await idle(served)


@pytest.mark.parametrize(
    ("teller", "reason", "prefill", "decode"),
    [
        ("prefill", "peer", "any", "other"),
        ("decode", "peer", "other", "any"),
        ("prefill", "internal", "other", "any"),
    ],
)
async def test_the_worker_that_is_to_blame_is_avoided(
    deploy: Deploy, teller: str, reason: str, prefill: str, decode: str
) -> None:
    async with deploy(prefill=2, decode=2) as served:
        for worker in served.prefills:
            worker.gate.clear()
        asked = asyncio.create_task(complete(served.http, PROMPT, seed=5))
        await until(lambda: any(w.num_running for w in served.decodes))
        await until(lambda: any(w.num_running for w in served.prefills))
        pair = (carrier(served.prefills), carrier(served.decodes))
        (work,) = pair[0].received(Prefill)
        told = pair[0] if teller == "prefill" else pair[1]
        told.tell(told.router, Failed(work.request, work.attempt, reason))
        await until(lambda: sum(len(w.received(Prefill)) for w in served.prefills) == 2)
        await until(lambda: sum(len(w.received(Admit)) for w in served.decodes) == 2)
        for worker, wanted, kind in ((pair[0], prefill, Prefill), (pair[1], decode, Admit)):
            assert wanted == "any" or len(worker.received(kind)) == 1, worker.info.id
        for worker in served.prefills:
            worker.gate.set()
        assert (await asked).ids == expected(PROMPT, 16, seed=5)


@pytest.mark.parametrize("reason", ["transfer", "peer"])
async def test_prefill_worker_that_cannot_reach_the_only_decode_worker_is_left_out(
    deploy: Deploy, reason: str
) -> None:
    async with deploy() as served:
        served.prefills[0].gate.clear()
        asked = asyncio.create_task(complete(served.http, PROMPT, seed=5))
        await until(lambda: served.prefills[0].num_running == 1)
        served.prefills[0].give_up(reason)
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        assert [work.prefill is None for work in served.decodes[0].received(Admit)] == [False, True]
        await idle(served)
