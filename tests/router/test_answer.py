"""Chunks that are made from a prebuilt frame are the same bytes as those that are not."""

import asyncio
from collections.abc import Sequence

import pytest

from common.messages import TokenLogprob
from common.sampling import SamplingParams
from router.answer import Answer, Options
from router.chat_answer import ChatAnswer
from router.completion_answer import CompletionAnswer
from router.request import Choice, Delta, Request, TextRule
from router.token_text import TokenText
from router.tokenizer import TextModel

TEXTS = ("one", ' "two"\n', "\u00e9\ue000text\ue001", "", "\\five")


def answers(model: TextModel, kind: type[Answer], options: Options) -> tuple[Answer, Answer]:
    """Two that differ in nothing."""
    rule = TextRule()
    request = Request(
        id=1,
        label="test",
        prompt=[5, 6],
        params=SamplingParams(max_tokens=100),
        rule=rule,
        salt="",
        events=asyncio.Queue(),
        first_choice=0,
        choices=[Choice(i, rule, model) for i in range(2)],
    )
    one, other = (kind("demo", TokenText(model), [request], options) for _ in range(2))
    other._id, other._created = one._id, one._created
    return one, other


def chunks(answer: Answer, deltas: Sequence[Delta], *, framed: bool) -> list[bytes]:
    result = []
    for delta in deltas:
        if not framed:
            for tally in answer._tallies:
                tally.frame = None
        answer.take(delta)
        result.append(answer.chunk(delta))
    return [*result, answer.closing()]


@pytest.mark.parametrize("kind", [CompletionAnswer, ChatAnswer])
@pytest.mark.parametrize(
    ("options", "has_frames"),
    [
        (Options(n=2), True),
        (Options(n=2, include_usage=True), True),
        (Options(n=2, include_usage=True, continuous_usage=True), False),
        (Options(n=2, token_ids=True), False),
        (Options(n=2, logprobs=1), False),
        (Options(n=2, prompt_logprobs=1), True),
    ],
)
def test_frames(
    text_model: TextModel, kind: type[Answer], options: Options, has_frames: bool
) -> None:
    logprobs = (TokenLogprob(7, -0.5, ((7, -0.5),)),)
    deltas = [
        Delta(choice, text, (7,), logprobs, "length" if text == TEXTS[-1] else "", None)
        for text in TEXTS
        for choice in range(2)
    ]
    one, other = answers(text_model, kind, options)
    assert chunks(one, deltas, framed=True) == chunks(other, deltas, framed=False)
    assert [tally.frame is not None for tally in one._tallies] == [has_frames] * 2
