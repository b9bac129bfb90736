"""Whatever a body holds, it is one of ours or refused at its first mistake."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from common.errors import RequestError
from router import conversation, schemas
from router.caps import DEFAULT
from router.fields import MAX_METADATA
from router.schemas import ChatBody, CompletionBody, SamplingBody, parse

HUGE = (2**31, 2**63, 2**70, -(2**63) - 1, -(2**70), 10**400)
INTEGERS = ("max_tokens", "min_tokens", "n", "top_k", "seed", "priority")
FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
MANY = 1_000_000


def refusal(kind: type[SamplingBody], data: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(kind, data)
    assert caught.value.status == 400
    assert len(caught.value.message) < 1_000
    return caught.value


@pytest.mark.parametrize("value", HUGE)
def test_huge_integers(value: int) -> None:
    text: dict[str, Any] = {"prompt": "x"}
    bodies: list[dict[str, Any]] = [{**text, name: value} for name in (*INTEGERS, *FLOATS)]
    bodies += [
        {**text, "logprobs": value},
        {**text, "stop_token_ids": [value]},
        {**text, "logit_bias": {"1": value}},
        {"prompt": [value]},
        {"prompt": [[value]]},
    ]
    for body in bodies:
        if body.get("seed") == 2**31:
            continue
        refusal(CompletionBody, body)
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for name in ("top_logprobs", "max_completion_tokens", *INTEGERS):
        if (name, value) != ("seed", 2**31):
            refusal(ChatBody, {**chat, name: value})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_numbers_are_finite(name: str, value: float) -> None:
    assert refusal(CompletionBody, {"prompt": "x", name: value}).param == name


@pytest.mark.parametrize("value", [1e-40, 0.0099, 100.1, -1.0])
def test_repetition_penalty_is_one_that_the_sampler_can_apply(value: float) -> None:
    error = refusal(CompletionBody, {"prompt": "x", "repetition_penalty": value})
    assert "0.01" in error.message or "100" in error.message
    for fine in (0.01, 1, 100.0):
        parse(CompletionBody, {"prompt": "x", "repetition_penalty": fine})


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **fields}]}


TEXT_PART = {"type": "text", "text": ""}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CAPS: list[tuple[type[SamplingBody], Any, int]] = [
    (CompletionBody, lambda n: {"prompt": ["x"] * n}, schemas.MAX_PROMPTS),
    (CompletionBody, lambda n: {"prompt": [[1]] * n}, schemas.MAX_PROMPTS),
    (CompletionBody, lambda n: {"prompt": [1] * n}, schemas.MAX_PROMPT_TOKENS),
    (CompletionBody, lambda n: {"prompt": "x", "stop": ["x"] * n}, DEFAULT.stop),
    (CompletionBody, lambda n: {"prompt": "x", "stop_token_ids": [1] * n}, DEFAULT.stop),
    (CompletionBody, lambda n: {"prompt": "x", "allowed_token_ids": [1] * n}, schemas.MAX_ALLOWED),
    (CompletionBody, lambda n: {"prompt": "x", "bad_words": ["x"] * n}, schemas.MAX_BAD_WORDS),
    (
        CompletionBody,
        lambda n: {"prompt": "x", "logprobs": 0, "logprob_token_ids": [1] * n},
        DEFAULT.logit_bias,
    ),
    (
        CompletionBody,
        lambda n: {"prompt": "x", "logit_bias": {str(i): 1 for i in range(n)}},
        DEFAULT.logit_bias,
    ),
    (
        CompletionBody,
        lambda n: {"prompt": "x", "metadata": {str(i): "" for i in range(n)}},
        MAX_METADATA,
    ),
    (ChatBody, lambda n: {"messages": message()["messages"] * n}, DEFAULT.messages),
    (ChatBody, lambda n: message(content=[TEXT_PART] * n), conversation.MAX_PARTS),
    (ChatBody, lambda n: message(tool_calls=[CALL] * n), conversation.MAX_TOOL_CALLS),
    (
        ChatBody,
        lambda n: {"messages": message(content=[TEXT_PART] * 64)["messages"] * (n // 64)
                   + message(content=[TEXT_PART] * (n % 64))["messages"]},
        conversation.MAX_ALL_PARTS,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "make", "cap"), CAPS)
def test_every_list_has_an_end(kind: type[SamplingBody], make: Any, cap: int) -> None:
    parse(kind, make(cap))
    refusal(kind, make(cap + 1))


WRONG: list[tuple[type[SamplingBody], Any]] = [
    (ChatBody, message(content=[0] * MANY)),
    (ChatBody, message(tool_calls=[0] * MANY)),
    (ChatBody, {"messages": [0] * MANY}),
    (ChatBody, {"messages": [{}] * DEFAULT.messages}),
    (ChatBody, message(content=[{}] * conversation.MAX_PARTS)),
    (ChatBody, message(content="x", **{str(i): 0 for i in range(100_000)})),
    (CompletionBody, {"prompt": ["x"] * MANY}),
    (CompletionBody, {"prompt": [None] * MANY}),
    (CompletionBody, {"prompt": [["x"]] * schemas.MAX_PROMPTS}),
    (CompletionBody, {"prompt": [[]] * MANY}),
    (CompletionBody, {"prompt": "x", **{str(i): 0 for i in range(100_000)}}),
    (CompletionBody, {"prompt": "x", "stop": [0] * MANY}),
    (CompletionBody, {"prompt": "x", "stop_token_ids": ["x"] * MANY}),
    (CompletionBody, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(100_000)}}),
    (CompletionBody, {"prompt": "x", "bad_words": [[]] * MANY}),
    (ChatBody, {**message(content="x"), "documents": [{str(i): 0 for i in range(100_000)}]}),
    (ChatBody, {**message(content="x"), "documents": [{"a": 0}] * schemas.MAX_DOCUMENTS}),
    (CompletionBody, {"prompt": "x", "x" * MANY: 1}),
    (CompletionBody, {"prompt": "x", "model": "x" * MANY}),
]


@pytest.mark.parametrize(("kind", "data"), WRONG)
def test_validation_ends_at_the_first_mistake(kind: type[SamplingBody], data: Any) -> None:
    refusal(kind, data)
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(data)
    assert caught.value.error_count() <= 8


def test_a_key_of_a_part_is_named_with_its_place() -> None:
    error = refusal(ChatBody, message(content=[{**TEXT_PART, "extra": 1}]))
    assert error.param == "messages.0.content.0.extra"
    assert error.code == "unknown_parameter"


def test_free_values_are_not_deep() -> None:
    deep = json.loads("[" * 500 + "]" * 500)
    assert refusal(CompletionBody, {"prompt": "x", "bad_words": deep}).param == "bad_words"
    assert refusal(CompletionBody, {"prompt": "x", "metadata": {"a": deep}}).param == "metadata"
    assert refusal(CompletionBody, {"prompt": deep}).param == "prompt"
    parse(CompletionBody, {"prompt": "x", "metadata": {"a": {"b": ["c"]}}})


def test_errors_speak_of_json() -> None:
    assert refusal(ChatBody, {"messages": [None]}).message == (
        "Invalid value for 'messages': input should be a valid dictionary."
    )
    assert refusal(CompletionBody, {"prompt": "x", "model": "x" * 1_025}).message == (
        "Invalid value for 'model': input should have at most 1024 characters."
    )
