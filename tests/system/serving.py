"""What the system tests do with a deployment: many requests at once, ledgers afterwards."""

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.client import Answer, complete, ledger, stream
from tests.deployment import Deployment

TINY = ("--dtype", "float32", "--max-model-len", "4096", "--kv-memory", "96M")
"""Flags for a tiny checkpoint: exact arithmetic, a pool that all prompts fit into."""
HANDED_OVER = ("--local-prefill", "fallback")
"""Every prompt takes the way through a prefill worker, although a tiny one costs less without."""


def deployment(
    model: Path, *flags: str, prefill: int = 1, decode: int = 1, tiny: bool = True
) -> Deployment:
    return Deployment(
        "--model", str(model), "--prefill", str(prefill), "--decode", str(decode),
        *(TINY if tiny else ()), *(HANDED_OVER if prefill else ()), *flags,
    )  # fmt: skip


async def complete_all(
    client: httpx.AsyncClient, prompts: Sequence[Sequence[int]], at_once: int, **params: Any
) -> list[Answer]:
    """All prompts, `at_once` in flight, half of them streamed; every one must succeed."""
    gate = asyncio.Semaphore(at_once)

    async def one(number: int, prompt: Sequence[int]) -> Answer:
        async with gate:
            ask = stream if number % 2 else complete
            return await ask(client, prompt, **params)

    answers = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    for answer in answers:
        assert answer.error is None, answer.error
    return list(answers)


async def settled(client: httpx.AsyncClient, within_s: float) -> dict[str, Any]:
    """The ledger once nothing runs and nothing is held; it must balance and come in time. A worker
    that does not answer at once has more to do than this: it is asked again.

    Raises AssertionError with the last ledger if blocks stay held.
    """
    deadline = time.monotonic() + within_s
    while True:
        report = await ledger(client)
        total, workers = report["total"], report["workers"].values()
        known = [worker for worker in workers if "error" not in worker]
        assert all(worker["balanced"] for worker in known), report
        held = [total[name] for name in ("running", "in_use", "leased", "receiving", "draining")]
        if len(known) == len(workers) and not any(held):
            assert total["free"] + total["cached"] == total["num_blocks"], report
            return report
        assert time.monotonic() < deadline, report
        await asyncio.sleep(0.05)


async def metric(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    """Sum of the samples of a metric of the router whose labels match."""
    response = await client.get("/metrics")
    response.raise_for_status()
    return metric_in(response.text, name, **labels)


async def worker_metric(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    """The same over all workers."""
    workers = (await client.get("/debug/workers")).json()["workers"]
    total = 0.0
    for worker in workers:
        response = await client.get(worker["url"])
        response.raise_for_status()
        total += metric_in(response.text, name, **labels)
    return total


def metric_in(text: str, name: str, **labels: str) -> float:
    total, found = 0.0, False
    for line in text.splitlines():
        match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)(?: \d+)?", line)
        if match is None:
            continue
        found = True
        given = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
        if all(given.get(key) == value for key, value in labels.items()):
            total += float(match[2])
    assert found, f"no metric {name}"
    return total
