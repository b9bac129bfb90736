"""LiteLLM against a server: `python litellm_client.py URL MODEL`."""

import asyncio
import json
import os
import sys
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # prices are not worth a download

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "weigh",
        "parameters": {
            "type": "object",
            "properties": {"grams": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["grams"],
            "additionalProperties": False,
        },
    },
}


def call_tools(common: dict[str, Any]) -> None:
    answer = litellm.completion(
        **common, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        max_tokens=200, seed=1,
    ).choices[0]  # fmt: skip
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert 1 <= json.loads(call.function.arguments)["grams"] <= 99
    turns = [
        *common["messages"],
        answer.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "12 g"},
    ]
    litellm.completion(**{**common, "messages": turns, "max_tokens": 8})


def main(url: str, model: str) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    for provider in ("openai", "hosted_vllm"):
        common = {
            "model": f"{provider}/{model}",
            "api_base": f"{url}/v1",
            "api_key": "none",
            "messages": messages,
        }
        brief = {**common, "temperature": 0, "max_tokens": 16}
        whole = litellm.completion(**brief)
        text = whole.choices[0].message.content
        assert whole.usage.completion_tokens <= 16
        options = {"include_usage": True}
        chunks = list(litellm.completion(**brief, stream=True, stream_options=options))
        shown = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(shown) == text
        built = litellm.stream_chunk_builder(chunks, messages=messages)
        assert built.usage.completion_tokens == whole.usage.completion_tokens
        assert asyncio.run(litellm.acompletion(**brief)).choices[0].message.content == text

        if provider == "openai":  # the other one takes the limits of objects out of schemas
            call_tools(common)
        long = [{"role": "user", "content": "tide " * 20_000}]
        try:
            litellm.completion(**{**brief, "messages": long})
        except litellm.ContextWindowExceededError:
            pass
        else:
            raise AssertionError("an overflow of the context was not recognised")
        try:
            litellm.completion(**{**brief, "model": f"{provider}/other"})
        except litellm.NotFoundError:
            pass
        else:
            raise AssertionError("a model that is not there was not recognised")


main(*sys.argv[1:])
