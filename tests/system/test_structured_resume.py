"""Grammars of choices that stop and go on elsewhere: their state is rebuilt from their tokens."""

import asyncio
import json
import os
import signal
from typing import Any

import jsonschema
import pytest

from tests.client import Answer, complete, http, stream
from tests.conftest import MakeCheckpoint
from tests.system.serving import deployment, settled, worker_metric

pytestmark = pytest.mark.system


def numbers(count: int) -> dict[str, Any]:
    """Sampled answers that consist of so many numbers, each in its own way."""
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["n"],
            "additionalProperties": False,
        },
        "minItems": count,
        "maxItems": count,
    }
    return {"guided_json": schema, "temperature": 1.0, "ignore_eos": False}


def check(answers: list[Answer], calm: list[Answer], schema: dict[str, Any]) -> None:
    """Valid, ended by themselves, different from each other, and what they are undisturbed."""
    assert [answer.error for answer in answers] == [None] * len(answers)
    for answer in answers:
        jsonschema.validate(json.loads(answer.text[0]), schema)
        assert answer.finish == {0: "stop"}
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in calm]
    assert len({answer.text[0] for answer in answers}) == len(answers)


async def test_preempted_answers_still_match(checkpoint: MakeCheckpoint) -> None:
    """A pool of 48 blocks (768 tokens) for 8 answers of some 200 tokens."""
    params = numbers(16)
    flags = ("--kv-blocks", "48", "--max-model-len", "512")
    with deployment(checkpoint("llama"), *flags) as served:
        async with http(served.url) as client:

            async def ask(seed: int) -> Answer:
                return await complete(client, [5 + seed], max_tokens=480, seed=seed, **params)

            calm = [await ask(seed) for seed in range(8)]
            before = await worker_metric(client, "tandem_preemptions_total")
            crowded = list(await asyncio.gather(*map(ask, range(8))))
            await settled(client, 30)
            preempted = await worker_metric(client, "tandem_preemptions_total") - before
    assert preempted > 0
    check(crowded, calm, params["guided_json"])


async def test_resumed_answers_still_match(checkpoint: MakeCheckpoint) -> None:
    """SIGKILL of a decode worker while constrained answers stream."""
    params = numbers(120)
    with deployment(checkpoint("llama"), decode=2) as served:
        async with http(served.url) as client:
            started = [asyncio.Event() for _ in range(4)]

            async def ask(seed: int, event: asyncio.Event | None = None) -> Answer:
                return await stream(
                    client, [5 + seed], max_tokens=3000, seed=seed, started=event, **params
                )

            calm = list(await asyncio.gather(*map(ask, range(4))))
            running = [asyncio.create_task(ask(i, event)) for i, event in enumerate(started)]
            async with asyncio.timeout(60):
                await asyncio.gather(*(event.wait() for event in started))
            assert not any(task.done() for task in running), "a stream ended before the fault"
            os.kill(served.pid("decode-0"), signal.SIGKILL)
            resumed = list(await asyncio.gather(*running))
            await settled(client, 30)
            text = (await client.get("/metrics")).text
    assert "tandem_router_resumes_total{" in text
    check(resumed, calm, params["guided_json"])
