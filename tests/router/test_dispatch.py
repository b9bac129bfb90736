"""Who gets a seat, who waits and how long: a dispatcher alone, with workers that say nothing."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.errors import RequestError
from common.link import RouterLink
from common.messages import Output
from common.sampling import SamplingParams
from router.directory import Directory
from router.dispatch import Dispatcher, Patience
from router.errors import unavailable
from router.explain import Explainer
from router.fleet import FULL, NOTHING, Fleet
from router.metrics import RouterMetrics
from router.placement import place
from router.request import Choice, Request, TextRule
from router.slo import Limit, Slo
from router.tokenizer import TextModel
from router.waiting import Bounds
from tests.router.deployment import TIMERS, until
from tests.worker_info import worker_info

PATIENT = Patience(grace_s=600, resume_s=600)
HASTY = Patience(grace_s=0, resume_s=0)


@dataclass
class Desk:
    model: TextModel
    fleet: Fleet
    explainer: Explainer
    dispatcher: Dispatcher
    ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def up(self, id: str, **changes: Any) -> None:
        """One more decode worker, with `FULL` seats."""
        self.fleet.up(worker_info(id, role="decode", max_num_seqs=1, **changes))

    def submit(self, tokens: int = 10, *, content: str | None = None, priority: int = 0) -> Request:
        request = Request(
            id=next(self.ids),
            label="test",
            prompt=[5] * tokens,
            params=SamplingParams(max_tokens=100, priority=priority),
            rule=TextRule(),
            salt="",
            events=asyncio.Queue(),
            first_choice=0,
            choices=[Choice(0, TextRule(), self.model)],
            content_id=content,
        )
        self.dispatcher.submit(request)
        return request

    def fill(self, content: str | None = None) -> list[Request]:
        """Take all seats of a worker."""
        return [self.submit(content=content, priority=-9) for _ in range(FULL)]

    def take_token(self, request: Request) -> None:
        (attempt,) = request.attempts.values()
        assert attempt.decode is not None
        self.dispatcher.take(attempt.decode, Output(request.id, attempt.number, 0, 0, (7,)))

    def lose(self, worker: str) -> None:
        self.fleet.down(worker)
        self.dispatcher.lost(worker, "lost")


@asynccontextmanager
async def desk(
    model: TextModel,
    patience: Patience = PATIENT,
    bounds: Bounds | None = None,
    slo: Slo | None = None,
) -> AsyncIterator[Desk]:
    link = RouterLink("test", TIMERS)
    directory = Directory("redis://127.0.0.1:1/0", "test")  # never asked
    metrics, fleet = RouterMetrics(), Fleet()
    explainer = Explainer(metrics)
    dispatcher = Dispatcher(
        directory, link, fleet, metrics, patience, explainer,
        slo=slo or Slo(), bounds=bounds or Bounds(),
    )  # fmt: skip
    try:
        yield Desk(model, fleet, explainer, dispatcher)
        dispatcher.fail_all(unavailable("It is over."))
        assert (dispatcher.num_live, dispatcher.num_waiting) == (0, 0)
        assert all(member.carried == NOTHING for member in fleet)
    finally:
        await link.close()
        await directory._client.aclose()


async def failure(request: Request) -> int:
    """The status that the request ends with."""
    async with asyncio.timeout(10):
        while not isinstance(event := await request.events.get(), RequestError):
            pass
    return event.status


async def test_a_seat_goes_to_who_waits_not_to_who_comes(text_model: TextModel) -> None:
    async with desk(text_model) as one:
        one.up("a")
        first, second = one.fill()
        waiting = one.submit()
        one.dispatcher.cancel(first)  # nobody tells of the seat
        late = one.submit()
        assert waiting.attempts and not late.attempts
        one.dispatcher.cancel(second)
        urgent = one.submit(priority=-1)
        assert urgent.attempts and not late.attempts


async def test_a_full_queue_refuses_nothing_that_began(text_model: TextModel) -> None:
    async with desk(text_model, bounds=Bounds(count=1)) as one:
        one.up("a")
        begun = one.fill()
        for request in begun:
            one.take_token(request)
        new = one.submit()
        assert await failure(one.submit()) == 503
        one.lose("a")
        assert not any(request.over for request in begun)
        assert one.dispatcher.num_waiting == FULL + 1
        one.up("b")
        one.dispatcher.retry_waiting()
        assert all(request.attempts for request in begun) and not new.attempts


async def test_who_began_on_another_model_does_not_wait_for_full_workers(
    text_model: TextModel,
) -> None:
    async with desk(text_model, HASTY) as one:
        one.up("a", content_id="c0")
        one.up("b", content_id="c1")
        one.fill("c0")
        begun = one.submit(content="c1")
        one.take_token(begun)
        one.lose("b")
        assert not begun.over and not begun.attempts
        assert await failure(begun) == 503


async def test_what_no_worker_can_take_does_not_stop_the_others(text_model: TextModel) -> None:
    async with desk(text_model) as one:
        one.up("a", content_id="c0")
        first, *_ = one.fill("c0")
        for _ in range(20):
            one.submit(content="c1", priority=-1)
        waiting = one.submit()
        assert not waiting.attempts
        one.dispatcher.cancel(first)
        one.dispatcher.serve_waiting()
        assert waiting.attempts


async def test_full_workers_that_leave_are_not_waited_for(text_model: TextModel) -> None:
    async with desk(text_model, HASTY) as one:
        one.up("a")
        running = one.fill()
        waiting = one.submit()
        assert [entry.timer for entry in one.dispatcher._waiting] == [None]
        one.dispatcher.leaving("a")
        assert await failure(waiting) == 503
        assert all(request.attempts for request in running)


async def test_who_waited_for_any_worker_waits_for_a_seat_of_one_that_came(
    text_model: TextModel,
) -> None:
    async with desk(text_model, HASTY) as one:
        waiting = one.submit()
        one.up("a")
        first, *_ = one.fill()  # before it, by priority
        (entry,) = one.dispatcher._waiting
        assert entry.timer is not None
        await until(lambda: entry.timer is None)
        assert not waiting.over
        one.dispatcher.cancel(first)
        one.dispatcher.serve_waiting()
        assert waiting.attempts


async def test_its_limit_holds_for_a_seat_too(text_model: TextModel) -> None:
    async with desk(text_model, HASTY, slo=Slo(ttft=Limit(0.5))) as one:
        waiting = one.submit()
        one.up("a")
        one.fill()
        assert await failure(waiting) == 429


async def test_full_workers_cost_no_placements(
    text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counting(view: Any, *rest: Any) -> Any:
        sizes.append(view.num_tokens)
        return place(view, *rest)

    async with desk(text_model) as one:
        one.up("a")
        one.fill()
        for tokens in (50, 60, 40, 50):
            one.submit(tokens)
        monkeypatch.setattr("router.dispatch.place", counting)
        one.dispatcher.serve_waiting()
        assert sizes == []
        one.up("small", num_blocks=1)  # 16 tokens
        one.dispatcher.serve_waiting()
        assert sizes == [50, 40]  # others are as large as one that found nothing


async def test_what_fails_while_it_is_placed_ends_alone(
    text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    async with desk(text_model) as one:
        one.up("a")
        monkeypatch.setattr(one.explainer, "placed", broken)
        assert await failure(one.submit()) == 500
        assert one.fleet["a"].carried == NOTHING
