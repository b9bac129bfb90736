"""Who waits at the router, in which order, and how much of it."""

from dataclasses import replace
from typing import Any

import msgspec

from router.metrics import RouterMetrics
from router.request import Request
from router.tokenizer import TextModel
from router.waiting import Bounds, Entry, Turns, WaitingQueue
from tests.router.test_request import request as make


def request(model: TextModel, tenant: str = "", max_tokens: int = 100, **params: Any) -> Request:
    one = make(model, **params)
    one.tenant = tenant
    one.params = msgspec.structs.replace(one.params, max_tokens=max_tokens)
    return one


def queue(**bounds: int) -> WaitingQueue:
    return WaitingQueue(RouterMetrics(), replace(Bounds(), **bounds))


def test_tenants_take_turns_by_the_tokens_that_they_ask_for(text_model: TextModel) -> None:
    waiting = queue()
    greedy = [Entry(request(text_model, "a"), (0,)) for _ in range(4)]
    late = [Entry(request(text_model, "b"), (0,)) for _ in range(2)]
    small = Entry(request(text_model, "c", max_tokens=10), (0,))
    for entry in (*greedy, *late, small):
        waiting.add(entry)
    order = [greedy[0], late[0], small, greedy[1], late[1], greedy[2], greedy[3]]
    assert list(waiting) == order
    waiting.remove(greedy[0])
    waiting.remove(late[0])
    again = Entry(request(text_model, "c"), (0,))
    waiting.add(again)  # small is 12 tokens ahead of the others' second ones
    assert list(waiting) == [small, again, greedy[1], late[1], greedy[2], greedy[3]]


def test_priority_goes_before_turns_and_resumed_ones_before_new_ones(
    text_model: TextModel,
) -> None:
    waiting = queue()
    first = Entry(request(text_model), (0,))
    urgent = Entry(request(text_model, priority=-1), (0,))
    resumed = Entry(request(text_model), (0,))
    resumed.request.choices[0].tokens.append(7)
    for entry in (first, urgent, resumed):
        waiting.add(entry)
    assert list(waiting) == [urgent, resumed, first]


def test_of_one_turn_the_nearest_deadline_is_first(text_model: TextModel) -> None:
    waiting = queue()
    calm, soon = (
        Entry(request(text_model, tenant), (0,), deadline=deadline)
        for tenant, deadline in (("a", 9.0), ("b", 5.0))
    )
    waiting.add(calm)
    waiting.add(soon)
    assert list(waiting) == [soon, calm]


def test_the_queue_is_bounded_by_count_tokens_and_bytes(text_model: TextModel) -> None:
    one = request(text_model)
    for bounds in ({"count": 2}, {"tokens": 4}, {"num_bytes": 2 * one.num_bytes}):
        waiting = queue(**bounds)
        for _ in range(2):
            assert waiting.has_room(one)
            waiting.add(Entry(one, (0,)))
        assert not waiting.has_room(one)
        waiting.forget(one)
        assert waiting.has_room(one) and not len(waiting)


def test_who_was_away_gets_no_credit_and_who_was_greedy_is_forgiven(text_model: TextModel) -> None:
    turns = Turns()
    assert [turns.take("a", 10), turns.take("a", 10), turns.take("b", 5)] == [0.0, 10.0, 0.0]
    turns.passed(10.0)
    assert [turns.take("new", 1), turns.take("b", 1), turns.take("a", 1)] == [10.0, 10.0, 20.0]
    waiting = queue()
    entries = [Entry(request(text_model, "a"), (0,)) for _ in range(9)]
    for entry in entries:
        waiting.add(entry)
    for entry in entries:
        waiting.remove(entry)
    again = Entry(request(text_model, "a"), (0,))
    waiting.add(again)
    assert again.rank[2] == 0.0
