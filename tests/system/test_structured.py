"""Answers that must match something, and scores of prompts, through real workers and handovers."""

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import pytest

from tests.client import http
from tests.conftest import MakeCheckpoint
from tests.system.serving import deployment

pytestmark = pytest.mark.system

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 1, "maximum": 40},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weigh", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
MESSAGES = [{"role": "user", "content": "how heavy is it?"}]


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def test_structured_answers(checkpoint: MakeCheckpoint) -> None:
    with deployment(checkpoint("llama"), "--max-num-seqs", "8") as served:
        async with http(served.url) as client:
            await check_schemas(client)
            await check_tools(client)
            await check_scores(client)
            await check_responses(client)
            await check_masks(client)


async def check_schemas(client: httpx.AsyncClient) -> None:
    """n > 1, constrained and free ones in one batch, first tokens from another worker."""
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    free = {"prompt": "free", "max_tokens": 60, "temperature": 0}
    alone = await ask(client, "/v1/completions", **free)
    jobs = [
        ask(
            client, "/v1/completions", prompt=f"give me {i}", n=3, response_format=format,
            max_tokens=400, seed=i,
        )
        for i in range(3)
    ]  # fmt: skip
    beside = ask(client, "/v1/completions", **free)
    *answers, same = await asyncio.gather(*jobs, beside)
    for answer in answers:
        for choice in answer["choices"]:
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
            assert choice["finish_reason"] == "stop"
        assert len({choice["text"] for choice in answer["choices"]}) == 3
    assert same["choices"] == alone["choices"]
    for extra, texts in (
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"regex": "a{3}"}}, {"aaa"}),
        ({"guided_grammar": 'root ::= "x" "y"'}, {"xy"}),
        ({"guided_regex": "(ab){2}", "ignore_eos": True, "min_tokens": 30}, {"abab"}),
    ):
        whole = await ask(client, "/v1/completions", prompt="x", max_tokens=50, **extra)
        assert whole["choices"][0]["text"] in texts
    response = await client.post(
        "/v1/completions",
        json={"prompt": "x", "guided_regex": "(((a{0,900}){0,900}){0,900}b){900}"},
    )
    assert response.status_code == 400 or response.json()["choices"]


async def check_tools(client: httpx.AsyncClient) -> None:
    chat = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 2000, "seed": 1}
    choice = (await ask(client, "/v1/chat/completions", **chat, tool_choice="required"))["choices"]
    assert choice[0]["finish_reason"] == "tool_calls"
    message = choice[0]["message"]
    assert message["content"] is None
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weigh":
            jsonschema.validate(arguments, SCHEMA)
    named = {"type": "function", "function": {"name": "weigh"}}
    whole = await ask(client, "/v1/chat/completions", **chat, tool_choice=named)
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


async def check_scores(client: httpx.AsyncClient) -> None:
    prompt = list(range(5, 45))
    ask_for = {"prompt": prompt, "temperature": 0, "echo": True, "logprobs": 2}
    scored = await ask(client, "/v1/completions", **ask_for, max_tokens=0)
    logprobs = scored["choices"][0]["logprobs"]
    assert scored["usage"]["completion_tokens"] == 0
    assert len(logprobs["token_logprobs"]) == 40
    assert logprobs["token_logprobs"][0] is None and logprobs["token_logprobs"][1] < 0
    # Cached or not, and beside an output: the same numbers.
    longer = await ask(client, "/v1/completions", **ask_for, max_tokens=3, n=2)
    assert longer["choices"][0]["logprobs"]["token_logprobs"][1:40] == pytest.approx(
        logprobs["token_logprobs"][1:], abs=1e-4
    )
    assert longer["usage"]["completion_tokens"] == 6
    rows = (await ask(client, "/v1/completions", prompt=prompt, prompt_logprobs=1, max_tokens=1))[
        "choices"
    ][0]["prompt_logprobs"]
    assert rows[0] is None and len(rows) == 40
    assert all(str(token) in row for token, row in zip(prompt[1:], rows[1:], strict=True))

    # A prompt as long as the context has no room for an output, but is scored.
    longest = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
    body = {**ask_for, "prompt": [5 + i % 90 for i in range(longest)], "max_tokens": 0}
    whole = await ask(client, "/v1/completions", **body)
    assert len(whole["choices"][0]["logprobs"]["token_logprobs"]) == longest


async def check_responses(client: httpx.AsyncClient) -> None:
    """/v1/responses says what a chat says, and calls what it must call."""
    greedy = {"temperature": 0, "seed": 1}
    chat = await ask(
        client, "/v1/chat/completions", messages=MESSAGES, max_completion_tokens=40, **greedy
    )
    brief = {"input": MESSAGES, "max_output_tokens": 40, **greedy}
    whole = await ask(client, "/v1/responses", **brief)
    said = whole["output"][0]["content"][0]["text"]
    assert said == chat["choices"][0]["message"]["content"]
    counts = [chat["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")]
    assert [whole["usage"][f"{kind}_tokens"] for kind in ("input", "output", "total")] == counts
    streamed, last = "", {}
    async with client.stream("POST", "/v1/responses", json={**brief, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
                if last["type"] == "response.output_text.delta":
                    streamed += last["delta"]
    assert streamed == said and last["type"] == f"response.{whole['status']}"
    assert last["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS[:1]]
    called = await ask(
        client, "/v1/responses", input="weigh it", tools=flat, tool_choice="required",
        parallel_tool_calls=False, max_output_tokens=2000, seed=3,
    )  # fmt: skip
    (item,) = called["output"]
    assert (item["type"], item["name"], called["status"]) == ("function_call", "weigh", "completed")
    jsonschema.validate(json.loads(item["arguments"]), SCHEMA)


async def check_masks(client: httpx.AsyncClient) -> None:
    """`allowed_token_ids` and `bad_words`: alone, greedy, with n > 1 and with a grammar."""
    common: dict[str, Any] = {"prompt": "x", "max_tokens": 24, "return_token_ids": True}
    allowed = list(range(40, 60))
    for extra in ({"temperature": 0}, {"n": 3, "seed": 2, "presence_penalty": 1.5}):
        whole = await ask(client, "/v1/completions", **common, **extra, allowed_token_ids=allowed)
        for choice in whole["choices"]:
            assert len(choice["token_ids"]) > 1 and set(choice["token_ids"]) <= set(allowed)
    single = [await ask(client, "/tokenize", prompt=digit) for digit in "0123456789"]
    digits = {
        "guided_regex": "[0-9]{12}",
        "allowed_token_ids": [entry["tokens"][-1] for entry in single],
    }
    few = await ask(client, "/v1/completions", **common, **digits, n=2, bad_words=list("12589"))
    for choice in few["choices"]:
        assert len(choice["text"]) == 12 and len(choice["token_ids"]) == 13  # the end, too
        assert set(choice["text"]) <= set("03467")
    for kind in ({"guided_regex": "[0-9]{12}"}, {}, {"temperature": 0}):
        nothing = {**common, **digits, "bad_words": list("0123456789"), "guided_regex": None}
        response = await client.post("/v1/completions", json={**nothing, **kind})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "nothing_allowed"
    whole = await ask(client, "/v1/completions", **common, logprobs=1, logprob_token_ids=[5, 3, 9])
    assert all(len(top) in (3, 4) for top in whole["choices"][0]["logprobs"]["top_logprobs"])
    chat = {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "logprob_token_ids": [9, 4]}
    whole = await ask(client, "/v1/chat/completions", **chat, return_tokens_as_token_ids=True)
    for entry in whole["choices"][0]["logprobs"]["content"]:
        assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:9", "token_id:4"]
