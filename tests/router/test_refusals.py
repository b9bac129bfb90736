"""What is wrong is refused with an OpenAI error body that names it; no worker hears of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import openai
import pytest

from common.messages import Admit, Prefill
from router.caps import Caps
from router.dispatch import Patience
from router.schemas import ChatBody, parse
from tests.router.conftest import Deploy
from tests.router.deployment import MODEL, Deployment, until

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object"}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [[]]}, "prompt", None),
    ({"prompt": ""}, "prompt", None),
    ({"prompt": ["a", 1]}, "prompt", None),
    ({"prompt": [1, "a"]}, "prompt", None),
    ({"prompt": [1, -1]}, "prompt", None),
    ({"prompt": [320]}, "prompt", None),
    ({"prompt": [1.5]}, "prompt", None),
    ({"prompt": [True]}, "prompt", None),
    ({"prompt": ["a"] * 257}, "prompt", None),
    ({**TEXT, "max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({**TEXT, "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({**TEXT, "max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({**TEXT, "max_tokens": True}, "max_tokens", "invalid_type"),
    ({**TEXT, "max_tokens": 2000}, "prompt", "context_length_exceeded"),
    ({"prompt": [5] * 1024}, "prompt", "context_length_exceeded"),
    ({"prompt": "x" * 900_000}, "prompt", "context_length_exceeded"),
    ({**TEXT, "min_tokens": 17}, "min_tokens", None),
    ({**TEXT, "temperature": -0.1}, "temperature", "invalid_value"),
    ({**TEXT, "temperature": "hot"}, "temperature", "invalid_type"),
    ({**TEXT, "top_p": 0}, "top_p", "invalid_value"),
    ({**TEXT, "top_p": 1.1}, "top_p", "invalid_value"),
    ({**TEXT, "top_k": -2}, "top_k", "invalid_value"),
    ({**TEXT, "top_k": 2**63}, "top_k", "invalid_value"),
    ({**TEXT, "max_tokens": 2**63}, "max_tokens", "invalid_value"),
    ({**TEXT, "stop_token_ids": [320]}, "stop_token_ids", None),
    ({**TEXT, "min_p": 2}, "min_p", "invalid_value"),
    ({**TEXT, "presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({**TEXT, "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({**TEXT, "n": 0}, "n", "invalid_value"),
    ({**TEXT, "n": 129}, "n", "invalid_value"),
    ({"prompt": ["a"] * 100, "n": 11}, "n", None),
    ({**TEXT, "seed": 2**63}, "seed", "invalid_value"),
    ({**TEXT, "seed": "1"}, "seed", "invalid_type"),
    ({**TEXT, "stop": ""}, "stop", None),
    ({**TEXT, "stop": ["a"] * 17}, "stop", None),
    ({**TEXT, "stop": [1]}, "stop", None),
    ({**TEXT, "stop": "x" * 1025}, "stop", None),
    ({**TEXT, "logprobs": 21}, "logprobs", "invalid_value"),
    ({**TEXT, "logprobs": True}, "logprobs", "invalid_type"),
    ({**TEXT, "logit_bias": {"a": 1}}, "logit_bias", None),
    ({**TEXT, "logit_bias": {"320": 1}}, "logit_bias", None),
    ({**TEXT, "logit_bias": {"1" * 5000: 1}}, "logit_bias", None),
    ({**TEXT, "logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({**TEXT, "logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({**TEXT, "stream": "yes"}, "stream", "invalid_type"),
    ({**TEXT, "stream_options": {"include_usage": True}}, "stream_options", None),
    ({**TEXT, "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({**TEXT, "temprature": 1}, "temprature", "unknown_parameter"),
    ({**TEXT, "suffix": "x"}, "suffix", "unsupported_parameter"),
    ({**TEXT, "prompt_embeds": "x"}, "prompt_embeds", "unsupported_parameter"),
    ({**TEXT, "vllm_xargs": {"a": 1}}, "vllm_xargs", "unsupported_parameter"),
    ({**TEXT, "request_id": 5}, "request_id", "invalid_type"),
    ({**TEXT, "n": 2, "best_of": 1}, "best_of", None),
    ({**TEXT, "best_of": 129}, "best_of", "invalid_value"),
    ({**TEXT, "prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({**TEXT, "guided_json": 5}, "guided_json", "invalid_value"),
    ({**TEXT, "guided_json": "{"}, "guided_json", "invalid_value"),
    ({**TEXT, "guided_json": {"type": "nope"}}, "guided_json", "invalid_grammar"),
    ({**TEXT, "guided_json": {"not": {}}}, "guided_json", "invalid_grammar"),
    ({**TEXT, "guided_regex": "("}, "guided_regex", "invalid_grammar"),
    ({**TEXT, "guided_regex": "x" * 65_537}, "guided_regex", "invalid_value"),
    ({**TEXT, "guided_choice": []}, "guided_choice", "invalid_value"),
    ({**TEXT, "guided_choice": ["a", 5]}, "guided_choice", "invalid_value"),
    ({**TEXT, "guided_grammar": "start: nothing"}, "guided_grammar", "invalid_grammar"),
    ({**TEXT, "guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", None),
    ({**TEXT, "structured_outputs": {}}, "structured_outputs", "invalid_value"),
    ({**TEXT, "structured_outputs": {"regx": "a"}}, "structured_outputs", "unknown_parameter"),
    (
        {**TEXT, "structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
        "structured_outputs",
        "unsupported_parameter",
    ),
    ({**TEXT, "priority": 2**31}, "priority", "invalid_value"),
    ({**TEXT, "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
    ({**TEXT, "truncate_prompt_tokens": 0}, "prompt", None),
    ({**TEXT, "use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ({**TEXT, "response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    *(
        ({**TEXT, "response_format": {"type": kind, **more}}, "response_format", "invalid_value")
        for kind, more in (
            ("json_object", {"schema": {"type": "object"}}),
            ("text", {"schema": {"type": "object"}}),
            ("json_schema", {"json_schema": {"schema": {"type": "object"}}}),
            ("json_schema", {"json_schema": {"name": "s", "shema": {"type": "object"}}}),
            ("json_schema", {"json_schema": {"name": "s"}, "schema": {"type": "object"}}),
        )
    ),
    ({**TEXT, "model": 5}, "model", "invalid_type"),
    ({**TEXT, "cache_salt": "x" * 257}, "cache_salt", "invalid_value"),
    ({**TEXT, "cache_salt": ""}, "cache_salt", "invalid_value"),
    ({**TEXT, "temperature": 2.1}, "temperature", "invalid_value"),
    ({**TEXT, "allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({**TEXT, "allowed_token_ids": [320]}, "allowed_token_ids", None),
    ({**TEXT, "allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_value"),
    ({**TEXT, "bad_words": [""]}, "bad_words", "invalid_value"),
    ({**TEXT, "bad_words": ["a"] * 129}, "bad_words", "invalid_value"),
    ({**TEXT, "logprob_token_ids": [1]}, "logprob_token_ids", None),
    ({**TEXT, "logprobs": 0, "logprob_token_ids": [320]}, "logprob_token_ids", None),
    ({**TEXT, "truncation_side": "middle"}, "truncation_side", None),
    *(
        ({**TEXT, name: value}, name, "unsupported_parameter")
        for name, value in {
            "repetition_detection": {"max_pattern_size": 4, "min_count": 2},
            "thinking_token_budget": 5,
            "stream_interval": 4,
            "watermarking": True,
            "early_stopping": True,
            "length_penalty": 0.5,
            "ec_transfer_params": {"a": 1},
            "return_token_offsets": True,
            "routed_experts_prompt_start": 3,
        }.items()
    ),
]
BAD_CHATS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    (
        {"messages": [{"role": "user"}], "tools": [{}]},
        "tools.0.function",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages", "invalid_value"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "invalid_type"),
    ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages.0.y", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "x": ""}]}]},
        "messages.0.content.0.x",
        "unknown_parameter",
    ),
    ({"messages": [{"role": "user", "audio": {"id": "x"}}]}, "messages", "invalid_value"),
    ({**CHAT, "top_logprobs": 1}, "top_logprobs", None),
    ({**CHAT, "logprobs": 1}, "logprobs", "invalid_type"),
    ({**CHAT, "max_completion_tokens": 5000}, "messages", "context_length_exceeded"),
    ({**CHAT, "tool_choice": "required"}, "tool_choice", None),
    ({**CHAT, "tool_choice": "required", "tools": []}, "tool_choice", None),
    ({**CHAT, "tool_choice": "auto"}, "tool_choice", None),
    ({**CHAT, "tool_choice": {"type": "function"}}, "tool_choice.function", None),
    (
        {
            **CHAT,
            "tools": [TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "g"}}],
                },
            },
        },
        "tool_choice",
        None,
    ),
    ({**CHAT, "tool_choice": "always"}, "tool_choice", None),
    ({**CHAT, "tools": [TOOL, TOOL]}, "tools", None),
    ({**CHAT, "tools": [TOOL] * 129}, "tools", None),
    (
        {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        None,
    ),
    ({**CHAT, "tools": [{"type": "web"}]}, "tools", None),
    (
        {**CHAT, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        None,
    ),
    ({**CHAT, "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({**CHAT, "truncate_prompt_tokens": 0}, "messages", None),
    ({**CHAT, "functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format", None),
    ({**CHAT, "chat_template": "x"}, "chat_template", "unsupported_parameter"),
    ({**CHAT, "prompt": "x"}, "prompt", "unknown_parameter"),
    ({**CHAT, "best_of": 2}, "best_of", "unsupported_parameter"),
    ({**CHAT, "documents": [{"a": 1}]}, "documents", "invalid_type"),
    ({**CHAT, "moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
    ({**CHAT, "logprob_token_ids": [1]}, "logprob_token_ids", None),
]
FINE: dict[str, Any] = {
    "model": None, "stream": None, "stream_options": None, "n": None, "max_tokens": 1, "stop": None,
    "temperature": None, "top_p": None, "presence_penalty": None, "logit_bias": None, "seed": None,
    "logprobs": None, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
    "response_format": {"type": "text"}, "guided_json": None, "priority": 0, "top_k": -1,
    "request_id": "r", "vllm_xargs": None, "kv_transfer_params": None, "logits_processors": None,
    "guided_decoding_backend": None, "guided_whitespace_pattern": None, "bad_words": [],
    "allowed_token_ids": None, "logprob_token_ids": [], "spaces_between_special_tokens": False,
    "prompt_cache_options": {"ttl": "30m"},
    "session_id": "s", "stream_interval": 1, "thinking_token_budget": -1, "watermarking": False,
    "repetition_detection": None, "mm_payload": "tensors", "truncation_side": "left",
}  # fmt: skip


def check(response: Any, status: int, param: str | None, code: str | None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error


async def test_bad_bodies(deploy: Deploy) -> None:
    async with deploy() as served:
        for path, cases in (("completions", BAD_COMPLETIONS), ("chat/completions", BAD_CHATS)):
            for body, param, code in cases:
                for stream in ({}, {"stream": True}):
                    given = {**stream, **body}
                    if "stream_options" in body and stream:
                        continue
                    check(await served.http.post(f"/v1/{path}", json=given), 400, param, code)
        for raw in (b"", b"{", b"\xff", b'"\\ud800"', b"[" * 100_000, b"NaN", b'{"n": 1e999}'):
            response = await served.http.post("/v1/completions", content=raw)
            check(response, 400, None, "invalid_json")
        values: list[Any] = [[], "x", 5, None]
        for value in values:
            response = await served.http.post("/v1/completions", json=value)
            check(response, 400, None, None)
        assert not any(worker.seen for worker in served.workers)


async def test_nulls_and_fields_without_effect_are_accepted(deploy: Deploy) -> None:
    async with deploy() as served:
        plain = await served.http.post("/v1/completions", json={**FINE, **TEXT, "best_of": 1})
        assert plain.status_code == 200, plain.text
        only_chat = {
            "tools": [], "tool_choice": "none", "modalities": ["text"], "moderation": None,
        }  # fmt: skip
        chat = await served.http.post(
            "/v1/chat/completions", json={**FINE, **CHAT, **only_chat, "top_logprobs": None}
        )
        assert chat.status_code == 200, chat.text
        tools = [
            {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "reasoning": "hm",
                "annotations": [],
                "parsed": {"a": 1},
                "provider_specific_fields": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {
                        "index": 1,
                        "id": "2",
                        "function": {"name": "f", "arguments": None, "parsed_arguments": {}},
                    },
                ],
            },
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "tool", "tool_call_id": "1", "content": "5"},
        ]
        chat = await served.http.post(
            "/v1/chat/completions", json={"messages": tools, "max_tokens": 1}
        )
        assert chat.status_code == 200, chat.text
        # What asks for nothing needs nothing, and no model is the one that there is.
        free = {**CHAT, "top_logprobs": 0, "tools": [], "tool_choice": "auto", "model": ""}
        chat = await served.http.post("/v1/chat/completions", json=free)
        assert chat.status_code == 200, chat.text


async def test_bodies_are_json_and_say_so(deploy: Deploy) -> None:
    """A page of another origin may send any other type without asking the browser's leave."""
    body = msgspec.json.encode({**TEXT, "max_tokens": 1})
    async with deploy() as served:
        for kind, status in (
            ("application/json; charset=utf-8", 200),
            ("Application/JSON", 200),
            ("application/vnd.api+json", 200),
            ("text/plain", 400),
            ("application/x-www-form-urlencoded", 400),
            ("", 400),
        ):
            response = await served.http.post(
                "/v1/completions", content=body, headers={"content-type": kind}
            )
            assert response.status_code == status, kind
            if status == 400:
                check(response, 400, None, "unsupported_media_type")
        assert (await served.http.post("/ping")).status_code == 200
        names = {**CHAT, "return_token_strs": "yes"}
        check(await served.http.post("/tokenize", json=names), 400, "return_token_strs", None)


async def test_words_that_clients_look_for(deploy: Deploy) -> None:
    async with deploy() as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await served.openai.completions.create(model=MODEL, prompt=[5] * 1020, max_tokens=5)
        assert "This model's maximum context length is 1024 tokens. However, you requested 1025 " \
            "tokens (1020 in the prompt, 5 in the completion)" in str(caught.value)  # fmt: skip
        with pytest.raises(openai.NotFoundError) as missing:
            await served.openai.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found"
        response = await served.http.post("/v1/chat/completions", json={**CHAT, "model": "other"})
        check(response, 404, "model", "model_not_found")


async def test_unknown_routes_methods_and_large_bodies(deploy: Deploy) -> None:
    async with deploy(caps=Caps(body_bytes=10_000)) as served:
        check(await served.http.get("/nothing"), 404, None, "not_found")
        check(await served.http.get("/v1/models/none"), 404, "model", "model_not_found")
        response = await served.http.get("/v1/completions")
        check(response, 405, None, "method_not_allowed")
        assert response.headers["allow"] == "POST"
        body = msgspec.json.encode({"prompt": "x" * 10_000})
        check(await served.http.post("/v1/completions", content=body), 413, None, "body_too_large")

        async def slowly() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 1_000

        check(
            await served.http.post("/v1/completions", content=slowly()), 413, None, "body_too_large"
        )


async def test_prompt_that_fits_no_worker(deploy: Deploy) -> None:
    async with deploy(num_blocks=4) as served:  # 64 tokens
        response = await served.http.post("/v1/completions", json={"prompt": [5] * 64})
        check(response, 400, "prompt", "context_length_exceeded")
        served.decodes[0].fail = "no_blocks"
        response = await served.http.post("/v1/completions", json={"prompt": [5] * 60})
        check(response, 400, None, None)


async def test_health_and_patience_without_workers(deploy: Deploy) -> None:
    async with deploy(prefill=1, decode=0) as served:
        assert await health(served) == (503, "no decode worker is connected")
        started = time.monotonic()
        response = await served.http.post("/v1/completions", json=TEXT)
        check(response, 503, None, "unavailable")
        assert response.headers["retry-after"] == "2"
        assert 0.25 < time.monotonic() - started < 2.0
        worker = await served.add("decode", "decode-late")
        assert await health(served) == (200, None)
        assert (await served.http.post("/v1/completions", json=TEXT)).status_code == 200
        worker.gate.clear()
        await worker.kill()
        await until(lambda: "decode-late" not in served.service.fleet)
        assert await health(served) == (503, "no decode worker is connected")
        response = await served.http.post("/v1/completions", json={**TEXT, "stream": True})
        check(response, 503, None, "unavailable")
        served.service.draining = True
        assert await health(served) == (503, "the router is shutting down")
        check(await served.http.post("/v1/completions", json=TEXT), 503, None, "unavailable")


async def health(served: Deployment) -> tuple[int, str | None]:
    response = await served.http.get("/health")
    return response.status_code, response.json().get("reason")


async def test_a_request_waits_for_the_first_worker(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=0, patience=Patience(grace_s=20)) as served:
        asked = served.http.post("/v1/completions", json={**TEXT, "max_tokens": 3})
        waiting = asyncio.create_task(asked)
        await asyncio.sleep(0)
        worker = await served.add("decode", "d")
        assert (await waiting).status_code == 200
        assert len(worker.received(Admit)) == 1 and not worker.received(Prefill)


async def test_worker_with_another_tokenizer_is_ignored(
    deploy: Deploy, caplog: pytest.LogCaptureFixture
) -> None:
    async with deploy(decode=0) as served:
        ours, served.text_id = served.text_id, "another"
        await served.start("decode", "stranger")
        await until(lambda: "tokenizer files differ" in caplog.text)
        # One that speaks our tokens comes later, and is there; the stranger still is not.
        served.text_id = ours
        await served.add("decode", "friend")
        assert {member.info.id for member in served.service.fleet} == {"prefill-0", "friend"}


MARK = {"cache_control": {"type": "ephemeral"}}
EXTRA = {"provider_specific_fields": {"a": 1}, "extra_content": {"google": {}}}
OF_CLIENTS: list[dict[str, Any]] = [
    # lm-eval writes the type of each message.
    {"role": "system", "content": "be brief", "type": "text"},
    # Marks for caches: Vercel's SDK, LiteLLM, OpenAI's own.
    {"role": "user", "content": "hi", **MARK, "id": "msg_1"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "a", **MARK},
            {"type": "text", "text": "b", "prompt_cache_breakpoint": {"mode": "explicit"}},
        ],
    },
    # Parts of another server's answer as LangChain keeps them, a message of LiteLLM.
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "c", "annotations": [], "index": 0, "id": "m"}],
        "images": [],
        "reasoning_items": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "f", "arguments": "{}", "provider_specific_fields": None},
                **EXTRA,
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "5", **MARK},
]


async def test_what_clients_add_changes_nothing(deploy: Deploy) -> None:
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]},
        {"role": "assistant", "content": "c", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
    ]
    marked = {**TOOL, **MARK, "function": {**TOOL["function"], **MARK}}
    async with deploy() as served:
        prompts = []
        for messages, tool in ((plain, TOOL), (OF_CLIENTS, marked)):
            response = await served.http.post(
                "/tokenize", json={"messages": messages, "tools": [tool]}
            )
            assert response.status_code == 200, response.text
            prompts.append(response.json()["tokens"])
        assert prompts[0] == prompts[1]
    # What the model is told of a tool is the tool alone.
    body = parse(ChatBody, {"messages": OF_CLIENTS, "tools": [marked]})
    assert [tool.model_dump(exclude_none=True) for tool in body.callable_tools] == [TOOL]
