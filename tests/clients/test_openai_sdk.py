"""The official OpenAI client, sync and async, against real workers: what applications rely on."""

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel, Field

from tests.conftest import MakeCheckpoint
from tests.system.serving import deployment

pytestmark = pytest.mark.system


class Fruit(BaseModel):
    name: str = Field(max_length=6)
    weight: int = Field(ge=1, le=99)


WEIGH = {
    "type": "function",
    "function": {"name": "weigh", "parameters": Fruit.model_json_schema()},
}
MESSAGES = [{"role": "user", "content": "weigh it"}]


def check_sync(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        assert client.models.retrieve(model).id == model
        parsed = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=Fruit, max_tokens=400, seed=1,  # type: ignore[arg-type]
        )  # fmt: skip
        fruit = parsed.choices[0].message.parsed
        assert fruit is not None and 1 <= fruit.weight <= 99 and len(fruit.name) <= 6
        names, arguments, ids, finish = [], "", [], None
        stream = client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[WEIGH], tool_choice="required",  # type: ignore[call-overload]
            parallel_tool_calls=False, max_tokens=400, seed=2, stream=True,
        )  # fmt: skip
        for chunk in stream:
            choice = chunk.choices[0]
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                ids += [call.id] if call.id else []
                arguments += call.function.arguments or ""
        assert finish == "tool_calls" and names == ["weigh"] and len(ids) == 1
        Fruit.model_validate(json.loads(arguments))
        scored = client.completions.create(
            model=model, prompt="the tide", echo=True, max_tokens=0, logprobs=1
        )
        assert scored.choices[0].text == "the tide"
        with pytest.raises(openai.BadRequestError, match="guided_regex"):
            client.completions.create(model=model, prompt="x", extra_body={"guided_regex": "("})
        with pytest.raises(openai.BadRequestError, match="embeddings"):
            client.embeddings.create(model=model, input="x")


async def check_async(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, n=2, temperature=0, stream=True,  # type: ignore[call-overload]
            stream_options={"include_usage": True},
        )  # fmt: skip
        texts, finishes, ids, usage = ["", ""], 0, set(), None
        async for chunk in stream:
            ids.add(chunk.id)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                finishes += choice.finish_reason is not None
        assert texts[0] == texts[1] and finishes == 2 and len(ids) == 1
        assert usage is not None and usage.completion_tokens <= 16


async def test_openai_sdk(checkpoint: MakeCheckpoint) -> None:

    with deployment(checkpoint("llama"), "--served-model-name", "tiny") as served:
        await asyncio.to_thread(check_sync, served.url)
        await check_async(served.url)
