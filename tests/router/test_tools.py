"""Calls of tools that a model chooses to make, in the forms of three families of chat templates:
from the tools in the prompt to the calls in the answer, streamed and not, and sent back."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.router.deployment import MODEL, Deployment, deployment
from tests.router.text_files import byte_level, write_text_files

HERMES = """\
{%- if tools %}<|im_start|>system
You may call functions. Signatures: <tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools> Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{%- if message.content %}
{{ message.content }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING = HERMES + "{# answers may begin with <think> and </think> #}"
LLAMA = """\
{{ bos_token }}
{%- if tools %}Respond with {"name": function, "parameters": dictionary of arguments}.
{%- for tool in tools %} {{ tool | tojson }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
<|{{ message.role }}|>
{%- for call in message.tool_calls or [] -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- else %}{{ message.content }}
{%- endfor %}
{%- endfor %}{# builtins come after <|python_tag|> #}"""
MISTRAL = """\
{{ bos_token }}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }},
"id": "{{ call.id }}"}
{%- endfor %}]
{%- else %}[INST]{{ message.content }}[/INST]
{%- endif %}
{%- endfor %}"""
CALL = '{"name": "weigh", "%s": {"grams": 5, "note": "a } b 😀"}}'
ARGUMENTS = {"grams": 5, "note": "a } b 😀"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weigh",
        "description": "puts it on the scales",
        "parameters": {"type": "object", "properties": {"grams": {"type": "integer"}}},
    },
}
CASES: list[tuple[str, str, str | None, int]] = [
    (HERMES, "So:\n<tool_call>\n" + CALL % "arguments" + "\n</tool_call>", "So:\n", 1),
    (
        HERMES,
        "\n".join(["<tool_call>" + CALL % "arguments" + "</tool_call>"] * 2),
        None,
        2,
    ),
    (HERMES, "It weighs < 5 g.", "It weighs < 5 g.", 0),
    (LLAMA, CALL % "parameters", None, 1),
    (LLAMA, "<|python_tag|>" + CALL % "parameters", None, 1),
    (LLAMA, 'No call: {"a": 1}', 'No call: {"a": 1}', 0),
    (MISTRAL, "[TOOL_CALLS][" + ", ".join([CALL % "arguments"] * 2) + "]", None, 2),
    (MISTRAL, '[TOOL_CALLS]weigh{"grams": 5, "note": "a } b 😀"}', None, 1),
]  # fmt: skip
QUESTION = {"role": "user", "content": "how heavy?"}


@asynccontextmanager
async def saying(
    redis: str, directory: Path, template: str, text: str
) -> AsyncIterator[Deployment]:
    """A deployment whose model has this chat template and always says this text."""
    tokenizer = byte_level()
    # As the families have them: hidden ones, but for those of Hermes.
    tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]"), AddedToken("<|python_tag|>")])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    files = write_text_files(directory, tokenizer, template)
    async with deployment(redis, files) as served:
        for worker in served.workers:
            worker.script = served.text_model.encode_now(text, add_special_tokens=False)
        yield served


@pytest.mark.parametrize(("template", "text", "content", "num_calls"), CASES)
async def test_what_a_model_chooses_to_call(
    router_redis: str, tmp_path: Path, template: str, text: str, content: str | None, num_calls: int
) -> None:
    ask: dict[str, Any] = {"messages": [QUESTION], "tools": [TOOL], "max_tokens": 300}
    async with saying(router_redis, tmp_path / "m", template, text) as served:
        response = await served.http.post(
            "/v1/chat/completions", json={**ask, "return_token_ids": True}
        )
        whole = response.json()
        shown = served.text_model.decode(whole["prompt_token_ids"], skip_special_tokens=False)
        assert "puts it on the scales" in shown
        (choice,) = whole["choices"]
        message = choice["message"]
        assert message["content"] == content
        assert choice["finish_reason"] == ("tool_calls" if num_calls else "stop")
        calls = message.get("tool_calls", [])
        assert [call["function"]["name"] for call in calls] == ["weigh"] * num_calls
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [
            ARGUMENTS
        ] * num_calls
        assert len({call["id"] for call in calls}) == num_calls
        if template is MISTRAL:
            assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)
        await check_stream(served, ask, message, choice["finish_reason"])
        # The call is a part of the next prompt, in the model's own form.
        if num_calls:
            turns = [QUESTION, message]
            turns += [
                {"role": "tool", "tool_call_id": call["id"], "content": "5 g"} for call in calls
            ]
            again = await served.http.post(
                "/v1/chat/completions", json={**ask, "messages": turns, "return_token_ids": True}
            )
            tokens = again.json()["prompt_token_ids"]
            shown = served.text_model.decode(tokens, skip_special_tokens=False)
            assert shown.count('"weigh"') == num_calls + 1 and "5 g" in shown
            assert json.dumps(ARGUMENTS, ensure_ascii=False) in shown
        # A client that wants no calls gets the text as it is.
        none = await served.http.post("/v1/chat/completions", json={**ask, "tool_choice": "none"})
        (choice,) = none.json()["choices"]
        assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
        assert choice["message"]["content"]


@pytest.mark.parametrize(
    ("template", "text", "content"),
    [
        (HERMES, "So: " + ("<tool_call>" + CALL % "arguments" + "</tool_call>") * 3, "So: "),
        (MISTRAL, "[TOOL_CALLS][" + ", ".join([CALL % "arguments"] * 2) + "]", None),
        (LLAMA, "; ".join([CALL % "parameters"] * 2), None),
    ],
)
async def test_one_call_where_parallel_ones_are_not_wanted(
    router_redis: str, tmp_path: Path, template: str, text: str, content: str | None
) -> None:
    ask: dict[str, Any] = {
        "messages": [QUESTION], "tools": [TOOL], "max_tokens": 400, "parallel_tool_calls": False,
    }  # fmt: skip
    async with saying(router_redis, tmp_path / "m", template, text) as served:
        whole = await served.http.post("/v1/chat/completions", json=ask)
        (choice,) = whole.json()["choices"]
        message = choice["message"]
        assert (message["content"], choice["finish_reason"]) == (content, "tool_calls")
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == ARGUMENTS
        await check_stream(served, ask, message, "tool_calls")
        more = await served.http.post(
            "/v1/chat/completions", json={**ask, "parallel_tool_calls": None}
        )
        assert len(more.json()["choices"][0]["message"]["tool_calls"]) > 1


async def check_stream(
    served: Deployment, ask: dict[str, Any], message: dict[str, Any], finish: str
) -> None:
    """Streamed it is the same, call by call, each with its id and name first."""
    content, finishes = "", []
    calls: list[dict[str, str]] = []
    stream = await served.openai.chat.completions.create(model=MODEL, stream=True, **ask)
    async for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finishes += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(calls) and call.function.name
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
    assert content == (message["content"] or "")
    assert finishes == [finish]
    assert calls == [call["function"] for call in message.get("tool_calls", [])]


async def test_reasoning_before_a_call(router_redis: str, tmp_path: Path) -> None:
    text = "<think>\nscales?</think>\n<tool_call>" + CALL % "arguments" + "</tool_call>"
    ask: dict[str, Any] = {"messages": [QUESTION], "tools": [TOOL], "max_tokens": 300}
    async with saying(router_redis, tmp_path / "m", THINKING, text) as served:
        for options, reasoning in (({}, "scales?"), ({"include_reasoning": False}, None)):
            whole = await served.http.post("/v1/chat/completions", json={**ask, **options})
            message = whole.json()["choices"][0]["message"]
            assert message.get("reasoning_content") == message.get("reasoning") == reasoning
            assert message["content"] is None and len(message["tool_calls"]) == 1
            shown = {**ask, **options, "logprobs": True, "return_token_ids": True}
            asked = await served.http.post("/v1/chat/completions", json=shown)
            (choice,) = asked.json()["choices"]
            assert (
                (choice["logprobs"] is None) == ("token_ids" not in choice) == (reasoning is None)
            )
            parts = await served.openai.chat.completions.create(
                model=MODEL, stream=True, logprobs=True, extra_body=options, **ask
            )
            seen = [part.choices[0].logprobs is not None async for part in parts]
            assert any(seen) == (reasoning is not None)


R1 = """\
{{ bos_token }}
{%- for message in messages %}
{%- set content = message.content %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif -%}
<{{ message.role }}>{{ content }}
{%- endfor %}{% if add_generation_prompt %}<assistant>{{ opening }}{% endif %}"""
QWEN3 = (
    HERMES
    + """\
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}
<think>\n\n</think>\n\n{% endif %}"""
)


@pytest.mark.parametrize(
    ("template", "extra", "text", "reasoning", "content"),
    [
        (R1, {}, "<think>\nhm\n</think>\n\nyes", "hm\n", "yes"),
        (R1, {"chat_template_kwargs": {"opening": "<think>\n"}}, "hm</think>yes", "hm", "yes"),
        (R1, {}, "yes", None, "yes"),
        (QWEN3, {}, "<think>\nhm</think>\nyes", "hm", "yes"),
        (QWEN3, {"reasoning_effort": "none"}, "yes", None, "yes"),
        (QWEN3, {"chat_template_kwargs": {"enable_thinking": False}}, "yes", None, "yes"),
    ],
)
async def test_reasoning_of_families(
    router_redis: str, tmp_path: Path, template: str, extra: dict[str, Any], text: str,
    reasoning: str | None, content: str,
) -> None:  # fmt: skip
    ask = {"messages": [QUESTION], "max_tokens": 300, **extra}
    async with saying(router_redis, tmp_path / "m", template, text) as served:
        whole = await served.http.post("/v1/chat/completions", json=ask)
        message = whole.json()["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)


async def test_marks_of_reasoning_that_are_special_tokens(
    router_redis: str, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<think>"), AddedToken("</think>")])
    files = write_text_files(tmp_path / "m", tokenizer, R1)
    async with deployment(router_redis, files) as served:
        script = served.text_model.encode_now("<think>hm</think>yes", add_special_tokens=False)
        for worker in served.workers:
            worker.script = script
        whole = await served.http.post("/v1/chat/completions", json={"messages": [QUESTION]})
        message = whole.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
