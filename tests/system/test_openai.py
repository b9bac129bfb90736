"""The official OpenAI client against a real deployment."""

import asyncio
import random

import openai
import pytest
from openai import AsyncOpenAI

from tests.conftest import MakeCheckpoint
from tests.system.serving import deployment

pytestmark = pytest.mark.system

WORDS = "the harbour wakes before boats come in with tide count baskets sky stones bread".split()


def sentences(count: int) -> list[str]:
    rng = random.Random(count)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(3, 60))) for _ in range(count)]


async def completion(client: AsyncOpenAI, prompt: str, streamed: bool) -> tuple[str, int]:
    """(text, completion tokens) of a greedy completion."""
    model, limit = "tiny", 24
    if not streamed:
        whole = await client.completions.create(
            model=model, prompt=prompt, max_tokens=limit, temperature=0
        )
        assert whole.usage is not None
        return whole.choices[0].text, whole.usage.completion_tokens
    text, used = "", 0
    async for chunk in await client.completions.create(
        model=model, prompt=prompt, max_tokens=limit, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        text += "".join(choice.text for choice in chunk.choices)
        if chunk.usage is not None:
            used = chunk.usage.completion_tokens
    return text, used


async def chat(client: AsyncOpenAI, prompt: str, streamed: bool) -> tuple[str, str | None]:
    """(text, finish reason) of a sampled, seeded chat answer."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    request = {"model": "tiny", "messages": messages, "max_completion_tokens": 24, "seed": 17}
    if not streamed:
        answer = await client.chat.completions.create(**request)  # type: ignore[call-overload]
        choice = answer.choices[0]
        return choice.message.content, choice.finish_reason
    text, finish = "", None
    stream = await client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


async def test_64_at_once_equal_their_sequential_runs(checkpoint: MakeCheckpoint) -> None:
    prompts = sentences(64)
    with deployment(checkpoint("llama"), "--served-model-name", "tiny") as served:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]
            for ask in (completion, chat):
                alone = [await ask(client, prompt, False) for prompt in prompts]
                together = await asyncio.gather(
                    *(ask(client, prompt, number % 2 == 0) for number, prompt in enumerate(prompts))
                )
                assert list(together) == alone
                assert any(text for text, _ in alone)

            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="other", prompt="x")
            assert missing.value.status_code == 404
            with pytest.raises(openai.BadRequestError, match="maximum context length is 4096"):
                await client.completions.create(model="tiny", prompt=[5] * 5000)
