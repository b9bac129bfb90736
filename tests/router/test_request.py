"""Each token is taken once, whichever worker and attempt brings it."""

import asyncio
from typing import Any

import pytest

from common.messages import Output, TokenLogprob
from common.sampling import SamplingParams
from router.request import Choice, Delta, Request, TextRule
from router.tokenizer import TextModel


def request(model: TextModel, *, n: int = 1, first: int = 0, rule: TextRule | None = None,
            **params: Any) -> Request:  # fmt: skip
    rule = rule or TextRule()
    return Request(
        id=1,
        label="test",
        prompt=[5, 6],
        params=SamplingParams(max_tokens=100, **params),
        rule=rule,
        salt="",
        events=asyncio.Queue(),
        first_choice=first,
        choices=[Choice(i, rule, model) for i in range(n)],
    )


def output(index: int, *tokens: int, choice: int = 0, finish: str = "", **more: Any) -> Output:
    return Output(1, 1, choice, index, tokens, finish, **more)


def ids(model: TextModel, text: str) -> tuple[int, ...]:
    return tuple(model.encode_now(text, add_special_tokens=False))


def test_repeated_tokens_are_dropped_by_index(text_model: TextModel) -> None:
    one = request(text_model, first=7)
    a, b, c = ids(text_model, "x")[0], ids(text_model, "y")[0], ids(text_model, "z")[0]
    assert one.take(output(0, a)) == Delta(7, "x", (a,), (), "", None)
    assert one.take(output(0, a)) is None
    assert one.take(output(0, a, b, c)) == Delta(7, "yz", (b, c), (), "", None)
    assert one.take(output(1, b)) is None
    assert one.take(output(2, c, finish="length")) == Delta(7, "", (), (), "length", None)
    assert one.take(output(3, a)) is None
    assert one.choices[0].tokens == [a, b, c]


def test_missing_tokens_are_noticed(text_model: TextModel) -> None:
    one = request(text_model)
    with pytest.raises(ValueError, match="token 0 is missing"):
        one.take(output(1, 5))
    assert one.choices[0].tokens == []


def test_logprobs_go_with_their_tokens(text_model: TextModel) -> None:
    one = request(text_model)
    a, b = ids(text_model, "x")[0], ids(text_model, "y")[0]
    one.take(output(0, a))
    both = (TokenLogprob(a, -1.0), TokenLogprob(b, -2.0))
    delta = one.take(output(0, a, b, logprobs=both))
    assert delta == Delta(0, "y", (b,), (TokenLogprob(b, -2.0),), "", None)


def test_the_token_that_ends_a_choice_has_no_text(text_model: TextModel) -> None:
    x = ids(text_model, "x")[0]
    assert request(text_model).take(output(0, x, finish="stop", stop_token=x)) == Delta(
        0, "", (x,), (), "stop", x
    )
    shown = request(text_model, rule=TextRule(include_stop=True))
    assert shown.take(output(0, x, finish="stop", stop_token=x)) == Delta(
        0, "x", (x,), (), "stop", x
    )
    limited = request(text_model)
    assert limited.take(output(0, x, finish="length")) == Delta(0, "x", (x,), (), "length", None)


def test_stop_string_ends_the_choice_and_cuts_what_came_with_it(text_model: TextModel) -> None:
    one = request(text_model, rule=TextRule(stop=("yz",)))
    x, y, z = (ids(text_model, letter)[0] for letter in "xyz")
    assert one.take(output(0, x, y)) == Delta(0, "x", (x, y), (), "", None)
    assert one.take(output(2, z, x, x)) == Delta(0, "", (z,), (), "stop", "yz")
    assert one.choices[0].finish == "stop"
    assert one.take(output(5, x)) is None


def test_stop_strings_wait_for_min_tokens(text_model: TextModel) -> None:
    one = request(text_model, rule=TextRule(stop=("x",)), min_tokens=2)
    x = ids(text_model, "x")[0]
    assert one.take(output(0, x, x)) == Delta(0, "xx", (x, x), (), "", None)
    assert one.take(output(2, x)) == Delta(0, "", (x,), (), "stop", "x")


def test_held_back_text_comes_at_the_end(text_model: TextModel) -> None:
    one = request(text_model, rule=TextRule(stop=("xyz",)))
    x, y = ids(text_model, "x")[0], ids(text_model, "y")[0]
    assert one.take(output(0, x)) == Delta(0, "", (x,), (), "", None)
    assert one.take(output(1, y, finish="length")) == Delta(0, "xy", (y,), (), "length", None)


def test_choices_are_separate(text_model: TextModel) -> None:
    one = request(text_model, n=2, first=4)
    x = ids(text_model, "x")[0]
    assert one.take(output(0, x, choice=1)) == Delta(5, "x", (x,), (), "", None)
    assert one.unfinished((0, 1)) == one.choices
    one.take(output(0, x, finish="length", choice=0))
    assert one.unfinished((0, 1)) == [one.choices[1]]
    assert one.num_outputs == 2 and one.remaining(one.choices[1]) == 99
