"""Who waits at the router, in which order, and how much of it."""

from dataclasses import replace
from typing import Any

import msgspec

from router.metrics import RouterMetrics
from router.request import Request
from router.tokenizer import TextModel
from router.waiting import Bounds, Entry, Misses, Turns, WaitingQueue
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


def test_who_gives_up_takes_no_turn(text_model: TextModel) -> None:
    waiting = queue()
    greedy = [Entry(request(text_model, "a"), (0,)) for _ in range(4)]
    for entry in greedy:
        waiting.add(entry)
    waiting.forget(greedy[3].request)
    newcomer = Entry(request(text_model, "b"), (0,))
    waiting.add(newcomer)
    assert list(waiting) == [greedy[0], newcomer, greedy[1], greedy[2]]


def test_who_comes_overtakes_only_lower_classes(text_model: TextModel) -> None:
    waiting = queue()
    calm = Entry(request(text_model), (0,))
    urgent = Entry(request(text_model, priority=-1), (0,))
    resumed = Entry(begun := request(text_model), (0,))
    begun.choices[0].tokens.append(7)
    for entry in (calm, urgent, resumed):
        waiting.add(entry)
    assert list(waiting.ahead_of(request(text_model))) == [urgent, resumed, calm]
    assert list(waiting.ahead_of(begun)) == [urgent, resumed]
    assert list(waiting.ahead_of(request(text_model, priority=-1))) == [urgent]
    assert list(waiting.ahead_of(request(text_model, priority=-2))) == []


def test_a_walk_leaves_out_what_was_removed_meanwhile(text_model: TextModel) -> None:
    waiting = queue()
    entries = [Entry(request(text_model), (0,)) for _ in range(3)]
    for entry in entries:
        waiting.add(entry)
    seen = []
    for entry in waiting:
        seen.append(entry)
        waiting.forget(entries[1].request)
    assert seen == [entries[0], entries[2]]


def test_what_is_as_large_as_a_miss_is_one_too(text_model: TextModel) -> None:
    def entry(tokens: int, content: str | None = None, max_tokens: int = 9) -> Entry:
        one = request(text_model, max_tokens=max_tokens)
        one.prompt, one.content_id = [5] * tokens, content
        return Entry(one, (0,))

    misses = Misses()
    misses.add(entry(50, "c0"))
    assert entry(50, "c0") in misses and entry(49, "c0") not in misses
    assert entry(50, "c1") not in misses and entry(50) not in misses
    misses.add(entry(40))
    assert all(entry(40, content) in misses for content in (None, "c0", "c1"))
    # A prefill worker alone is enough for one token.
    assert entry(40, max_tokens=1) not in misses
    picky = entry(20)
    picky.request.refused.add("d")
    misses.add(picky)
    assert entry(20) not in misses


def test_what_a_request_carries_counts(text_model: TextModel) -> None:
    plain = request(text_model).num_bytes
    large: dict[str, Any] = {
        "allowed_tokens": bytes(4_000), "bad_words": ((5,) * 200,), "grammar": "x" * 5_000,
        "logit_bias": tuple((token, 1.0) for token in range(300)),
    }  # fmt: skip
    for name, value in large.items():
        assert request(text_model, **{name: value}).num_bytes >= plain + 4_000, name
