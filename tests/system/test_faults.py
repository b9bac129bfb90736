"""Workers that die or leave under load: every stream goes on with the same tokens, or says why."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence

import httpx
import pytest

from tests.client import Answer, complete, http, stream
from tests.conftest import MakeCheckpoint
from tests.deployment import Deployment
from tests.system.prompts import tokens
from tests.system.serving import complete_all, deployment, settled

pytestmark = pytest.mark.system

OUTPUT = 2000
"""Long enough that every stream is in the middle when the fault comes."""


def some_prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [tokens(rng, rng.randrange(10, 120)) for _ in range(count)]


async def streams_in_the_middle(
    client: httpx.AsyncClient, prompts: Sequence[list[int]]
) -> "list[asyncio.Task[Answer]]":
    """Streams of all prompts, every one of which has shown a token and none of which ended."""
    events = [asyncio.Event() for _ in prompts]
    tasks = [
        asyncio.create_task(stream(client, prompt, max_tokens=OUTPUT, started=event))
        for prompt, event in zip(prompts, events, strict=True)
    ]
    async with asyncio.timeout(60):
        await asyncio.gather(*(event.wait() for event in events))
    assert not any(task.done() for task in tasks), "a stream ended before the fault"
    return tasks


async def listed(client: httpx.AsyncClient) -> set[int]:
    """Process ids of the workers that the router would place a request on."""
    workers = (await client.get("/debug/workers")).json()["workers"]
    return {worker["pid"] for worker in workers}


async def avoided(client: httpx.AsyncClient, pid: int, within_s: float) -> float:
    """Seconds until the router no longer lists the worker."""
    start = time.monotonic()
    while pid in await listed(client):
        assert time.monotonic() - start < within_s, f"{pid} is still listed"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


async def run_with_kill(
    served: Deployment, victim: str, prompts: Sequence[list[int]], number: signal.Signals
) -> tuple[list[Answer], list[Answer]]:
    """Answers without and with the signal to `victim` while all prompts stream."""
    pid = served.pid(victim)
    async with http(served.url) as client:
        calm = await complete_all(client, prompts, len(prompts), max_tokens=OUTPUT)
        running = await streams_in_the_middle(client, prompts)
        since = len(served.lines)
        os.kill(pid, number)
        if number is signal.SIGKILL:
            await avoided(client, pid, 3.0)
            killed = f"^{victim} +exited +by SIGKILL$"
            await asyncio.to_thread(served.wait_for, killed, since)
        after = await complete(client, prompts[0], max_tokens=OUTPUT)
        assert after.tokens == calm[0].tokens
        faulty = await asyncio.gather(*running)
        await settled(client, 15)
    return calm, faulty


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_killed_worker_costs_no_token(checkpoint: MakeCheckpoint, victim: str) -> None:
    prompts = some_prompts(6)
    with deployment(checkpoint("llama"), prefill=2, decode=2) as served:
        calm, faulty = await run_with_kill(served, victim, prompts, signal.SIGKILL)
    assert [answer.error for answer in faulty] == [None] * len(prompts)
    assert [answer.tokens for answer in faulty] == [answer.tokens for answer in calm]
    assert all(answer.done for answer in faulty)


async def test_killed_prefill_worker_loses_no_prompt(checkpoint: MakeCheckpoint) -> None:
    """SIGKILL while long prompts are being read: before any of them has a token."""
    rng = random.Random(2)
    prompts = [tokens(rng, 1500) for _ in range(8)]
    flags = ("--max-num-batched-tokens", "64")
    with deployment(checkpoint("llama"), *flags, prefill=2) as served:
        pid = served.pid("prefill-0")
        async with http(served.url) as client:
            running = asyncio.create_task(complete_all(client, prompts, 8, max_tokens=8))
            while not any(
                worker["load"]["prefill_tokens"] and worker["pid"] == pid
                for worker in (await client.get("/debug/workers")).json()["workers"]
            ):
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            answers = await running
            again = await complete_all(client, prompts, 8, max_tokens=8)
            await settled(client, 15)
    assert [a.tokens for a in answers] == [a.tokens for a in again]


async def test_only_decode_worker_killed(checkpoint: MakeCheckpoint) -> None:
    """Nobody is left to go on: the streams wait for the next life of the worker and continue with
    the same tokens, or end with an error event. Never silence, never wrong text."""
    prompts = some_prompts(4)
    with deployment(checkpoint("llama")) as served:
        calm, faulty = await run_with_kill_of_all(served, prompts)
    for right, answer in zip(calm, faulty, strict=True):
        assert answer.done
        if answer.error is None:
            assert answer.tokens == right.tokens
        else:
            assert right.ids[: len(answer.ids)] == answer.ids


async def run_with_kill_of_all(
    served: Deployment, prompts: Sequence[list[int]]
) -> tuple[list[Answer], list[Answer]]:
    async with http(served.url) as client:
        calm = await complete_all(client, prompts, len(prompts), max_tokens=OUTPUT)
        running = await streams_in_the_middle(client, prompts)
        os.kill(served.pid("decode-0"), signal.SIGKILL)
        faulty = await asyncio.gather(*running)
        since = len(served.lines)
        while (await client.get("/health")).status_code != 200:
            assert len(served.lines) - since < 500
            await asyncio.sleep(0.1)
        assert (await complete(client, prompts[0], max_tokens=OUTPUT)).tokens == calm[0].tokens
        await settled(client, 15)
    return calm, faulty


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_terminated_worker_finishes_what_it_holds(
    checkpoint: MakeCheckpoint, victim: str
) -> None:
    prompts = some_prompts(6)
    with deployment(checkpoint("llama"), prefill=2, decode=2) as served:
        calm, faulty = await run_with_kill(served, victim, prompts, signal.SIGTERM)
        served.wait_for(rf"^{victim} +exited +code 0")
    assert [answer.error for answer in faulty] == [None] * len(prompts)
    assert [answer.tokens for answer in faulty] == [answer.tokens for answer in calm]
