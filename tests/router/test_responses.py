"""`/v1/responses`: the official client reads it, and it says what a chat says."""

from typing import Any

import msgspec
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage

from common.errors import RequestError
from router.response_items import Event, Items
from router.response_schemas import parse_response
from router.responses import chat_fields, messages
from tests.router.conftest import Deploy
from tests.router.deployment import MODEL, Deployment, until
from tests.router.stub_worker import expected

TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}
ASK: dict[str, Any] = {"model": MODEL, "input": "the tide?", "extra_body": {"seed": 5}}


async def events(served: Deployment, **body: Any) -> list[Event]:
    body = {"input": "the tide?", "seed": 5, "stream": True, **body}
    async with served.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200
        lines = [line async for line in response.aiter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    values = [msgspec.json.decode(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [value["type"] for value in values]
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    return values


async def test_text_is_that_of_a_chat(deploy: Deploy) -> None:
    async with deploy() as served:
        chat = await served.openai.chat.completions.create(
            model=MODEL, seed=5, max_tokens=20,
            messages=[{"role": "system", "content": "be brief"},
                      {"role": "user", "content": "the tide?"}],
        )  # fmt: skip
        whole = await served.openai.responses.create(
            **ASK, instructions="be brief", max_output_tokens=20, metadata={"a": "b"}
        )
        assert whole.output_text == chat.choices[0].message.content
        assert (whole.status, whole.object, whole.id[:5]) == ("incomplete", "response", "resp_")
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage is not None and chat.usage is not None
        assert whole.usage.input_tokens == chat.usage.prompt_tokens
        assert (whole.usage.output_tokens, whole.usage.total_tokens) == (
            20, chat.usage.total_tokens,
        )  # fmt: skip
        assert (whole.instructions, whole.metadata) == ("be brief", {"a": "b"})
        stream = await served.openai.responses.create(
            **ASK, instructions="be brief", max_output_tokens=20, stream=True
        )
        text, last = "", None
        async for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
            last = event
        assert last is not None and last.type == "response.incomplete"
        assert text == last.response.output_text == whole.output_text
        assert last.response.usage == whole.usage


async def test_events_in_order(deploy: Deploy) -> None:
    async with deploy() as served:
        said = await events(served, max_output_tokens=6, top_logprobs=2)
        kinds = [event["type"].removeprefix("response.") for event in said]
        deltas = [event for event in said if event["type"] == "response.output_text.delta"]
        assert [kind for kind in kinds if kind != "output_text.delta"] == [
            "created", "in_progress", "output_item.added", "content_part.added",
            "output_text.done", "content_part.done", "output_item.done", "incomplete",
        ]  # fmt: skip
        assert said[0]["response"]["output"] == []
        (item,) = said[-1]["response"]["output"]
        assert said[-2]["item"] == item and item["status"] == "incomplete"
        assert said[2]["item"] == {**item, "content": [], "status": "in_progress"}
        (part,) = item["content"]
        assert part["text"] == "".join(event["delta"] for event in deltas)
        assert len(part["logprobs"]) == 6 and len(part["logprobs"][0]["top_logprobs"]) == 2
        shown = [entry for event in deltas for entry in event["logprobs"]]
        assert part["logprobs"][: len(shown)] == shown


async def test_a_named_function(deploy: Deploy) -> None:
    async with deploy() as served:
        params: dict[str, Any] = {
            **ASK, "tools": [TOOL], "tool_choice": {"type": "function", "name": "f"},
            "max_output_tokens": 12,
        }  # fmt: skip
        whole = await served.openai.responses.create(**params)
        (call,) = whole.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert call.name == "f" and call.call_id.startswith("call_")
        assert whole.tools[0].type == "function"
        arguments, done, last = "", None, None
        async for event in await served.openai.responses.create(**params, stream=True):
            if event.type == "response.function_call_arguments.delta":
                arguments += event.delta
            if event.type == "response.function_call_arguments.done":
                done = event.arguments
            last = event
        assert arguments == done == call.arguments
        assert last is not None and last.type == "response.incomplete"
        assert last.response.output[0].type == "function_call"


async def test_a_stop_completes_and_an_output_can_be_sent_back(deploy: Deploy) -> None:
    async with deploy() as served:
        first = await served.openai.responses.create(**ASK, max_output_tokens=20)
        stop = {"seed": 5, "stop": first.output_text[3:5]}
        done = await served.openai.responses.create(
            model=MODEL, input="the tide?", max_output_tokens=20, extra_body=stop
        )
        assert done.status == "completed" and done.output_text == first.output_text[:3]
        assert isinstance(done.output[0], ResponseOutputMessage)
        again = await served.openai.responses.create(
            model=MODEL, max_output_tokens=4,
            input=[{"role": "user", "content": "the tide?"}, *done.output,  # type: ignore[list-item]
                   {"role": "user", "content": [{"type": "input_text", "text": "why?"}]}],
        )  # fmt: skip
        assert again.usage is not None and done.usage is not None
        assert again.usage.input_tokens > done.usage.input_tokens


async def test_a_stream_that_fails_says_so(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        (worker,) = served.decodes
        worker.ends_at = 3
        stream = await served.openai.responses.create(**ASK, max_output_tokens=20, stream=True)
        await until(lambda: worker.steps == 3)
        served.service.shut_down()
        kinds = [event.type async for event in stream]
        assert kinds[-1] == "response.failed" and "response.completed" not in kinds


REFUSED: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id",
     "unsupported_parameter"),
    ({"input": "x", "background": True}, "background", "unsupported_parameter"),
    ({"input": "x", "conversation": "c"}, "conversation", "unsupported_parameter"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
    ({"input": "x", "truncation": "auto"}, "truncation", "unsupported_parameter"),
    ({"input": "x", "include": ["file_search_call.results"]}, "include", "unsupported_parameter"),
    ({"input": "x", "text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
    ({"input": [{"type": "item_reference", "id": "1"}]}, "input", "unsupported_parameter"),
    ({"input": "x", "temprature": 1}, "temprature", "unknown_parameter"),
    ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format", "invalid_value"),
    ({"input": "x", "max_output_tokens": 9000}, "input", "context_length_exceeded"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"input": "x", "temperature": -1}, "temperature", "invalid_value"),
    ({"input": "x", "tool_choice": "required"}, "tool_choice", None),
    ({"input": "x", "tools": [TOOL, TOOL]}, "tools", None),
    ({"input": []}, "input", None),
    ({"input": [{"role": "king", "content": "x"}]}, "input", None),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", None),
    ({}, "input", "missing_required_parameter"),
]  # fmt: skip


async def test_what_cannot_be_had_is_refused_by_name(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        for body, param, code in REFUSED:
            response = await served.http.post("/v1/responses", json=body)
            assert response.status_code == 400, (body, response.text)
            error = response.json()["error"]
            found = error["param"] if param != "input" else error["param"].split(".")[0]
            assert found == param, (body, error)
            assert code is None or error["code"] == code, (body, error)
        assert not any(worker.seen for worker in served.workers)
        fine = {"store": True, "background": False, "truncation": "disabled", "user": "u"}
        response = await served.http.post("/v1/responses", json={"input": "x", **fine})
        assert response.status_code == 200 and response.json()["store"] is False
        with pytest.raises(openai.NotFoundError):
            await served.openai.responses.retrieve("resp_1")
        answer = await served.http.post("/v1/responses", json={"input": "x", "seed": 0})
        prompt = served.text_model.encode_now(
            "<|begin|><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n",
            add_special_tokens=False,
        )
        tokens = expected(prompt, answer.json()["usage"]["output_tokens"])
        assert answer.json()["output"][0]["content"][0]["text"] == served.text_model.decode(tokens)


def test_turns_become_messages() -> None:
    def part(kind: str, text: str) -> dict[str, Any]:
        return {"type": kind, "text": text}

    call = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "f"}
    body = parse_response(
        {
            "instructions": "i",
            "input": [
                {"type": "message", "role": "user", "content": "a"},
                {"type": "reasoning", "id": "rs_1", "summary": [],
                 "content": [part("reasoning_text", "hm")]},
                {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                 "content": [{**part("output_text", "b"), "annotations": [], "logprobs": []}]},
                {**call, "call_id": "1", "arguments": "{}"},
                {**call, "call_id": "2", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "5"},
                {"type": "function_call_output", "call_id": "2",
                 "output": [part("input_text", "6")]},
                {"role": "assistant", "content": "c"},
                {"role": "developer", "content": "d"},
            ],
        }
    )  # fmt: skip
    calls = [
        {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        for id in ("1", "2")
    ]
    assert messages(body) == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "tool", "tool_call_id": "2", "content": "6"},
        {"role": "assistant", "content": "c"},
        {"role": "developer", "content": "d"},
    ]


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True}
    body = {"input": "x", "text": {"format": schema}, "reasoning": {"effort": "low"}, "top_k": 3}
    fields = chat_fields(parse_response(body))
    inner = {name: value for name, value in schema.items() if name != "type"}
    assert fields["response_format"] == {"type": "json_schema", "json_schema": inner}
    assert (fields["reasoning_effort"], fields["top_k"]) == ("low", 3)
    same = {
        "chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": False,
        "structured_outputs": {"choice": ["a"]}, "bad_words": ["b"], "allowed_token_ids": [1],
        "skip_special_tokens": False, "include_stop_str_in_output": True, "seed": 0,
    }  # fmt: skip
    fields = chat_fields(parse_response({"input": "x", **same}))
    assert {name: fields[name] for name in same} == same
    with pytest.raises(RequestError, match="JSON object"):
        parse_response([])


def test_items_close_each_other() -> None:
    items = Items()
    told = [
        *items.reason("h"), *items.reason("m"), *items.say("a", ()), *items.call("1", "f"),
        *items.argue("{"), *items.argue("}"), *items.call("2", "g"), *items.close("incomplete"),
    ]  # fmt: skip
    assert [(item["type"], item["status"]) for item in items.output] == [
        ("reasoning", "completed"), ("message", "completed"),
        ("function_call", "completed"), ("function_call", "incomplete"),
    ]  # fmt: skip
    assert items.output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert [item.get("arguments") for item in items.output] == [None, None, "{}", ""]
    added = [event["output_index"] for event in told if "item.added" in event["type"]]
    done = [event["output_index"] for event in told if "item.done" in event["type"]]
    assert added == done == [0, 1, 2, 3]
    assert items.close("completed") == []
