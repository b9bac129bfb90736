"""The load that P/D disaggregation is for: long prompts arrive while others are being answered.

A few streams decode all the time, each begun again when it ends; a long prompt comes at a fixed
interval, whether or not the one before it was answered. What is unfinished at the end counts with
the time that it has waited so far, so that a server that stalls does not look better.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import aiohttp
import numpy as np

from benchmarks.client import Record, Target, connect, send
from benchmarks.datasets import Part, Query, Seed

if TYPE_CHECKING:
    from benchmarks.compare.loads import Column

_STREAM, _PROMPT = 0, 1


@dataclass(frozen=True, slots=True)
class Mix:
    """`streams` decode streams of `input_len`/`output_len`, and a prompt of `prompt_len` tokens
    each `every_s`, for `seconds`."""

    name: str
    streams: int
    input_len: int
    output_len: int
    prompt_len: int
    prompt_output_len: int
    every_s: float
    seconds: float
    columns: "tuple[Column, ...]"

    def shortened(self) -> "Mix":
        """A load of the same kind that takes seconds."""
        return replace(self, prompt_len=256, every_s=2.0, seconds=8.0, streams=2)


async def run_mix(mix: Mix, target: Target, vocab_size: int, seed: Seed) -> dict[str, float]:
    """Run the load; returns the decode streams' gaps and rate and the prompts' TTFT.

    Raises ConnectionError if a request fails.
    """
    streams: list[Record] = []
    prompts: list[Record] = []

    def query(kind: int, number: int, input_len: int, output_len: int) -> Query:
        parts = (Part((*seed, kind, number), input_len),)
        return Query(parts, input_len, output_len, vocab_size)

    async def one(session: aiohttp.ClientSession, query: Query, records: list[Record]) -> None:
        record = Record(due=time.perf_counter(), input_len=query.input_len)
        records.append(record)
        await send(session, target, target.body(query.tokens(), query.output_len), record)
        if record.error:
            raise ConnectionError(f"{mix.name}: {record.error}")

    async def decode(session: aiohttp.ClientSession, number: int) -> None:
        again = 0
        while True:
            asked = query(_STREAM, number + again * mix.streams, mix.input_len, mix.output_len)
            await one(session, asked, streams)
            again += 1

    async def prefill(session: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> None:
        number = 0
        while True:
            await asyncio.sleep(start + (number + 0.5) * mix.every_s - time.perf_counter())
            asked = query(_PROMPT, number, mix.prompt_len, mix.prompt_output_len)
            tasks.create_task(one(session, asked, prompts))
            number += 1

    async with connect() as session:
        warm = query(_PROMPT, 1_000_000, mix.prompt_len, mix.prompt_output_len)
        await one(session, warm, [])
        start = time.perf_counter()
        try:
            async with asyncio.timeout(mix.seconds), asyncio.TaskGroup() as tasks:
                for number in range(mix.streams):
                    tasks.create_task(decode(session, number))
                tasks.create_task(prefill(session, tasks))
        except TimeoutError:
            end = time.perf_counter()
        except BaseExceptionGroup as group:
            raise ConnectionError(str(group.exceptions[0])) from group
    return figures(streams, prompts, start, end)


def figures(
    streams: Iterable[Record], prompts: Iterable[Record], start: float, end: float
) -> dict[str, float]:
    """Figures of what was seen from `start` to `end`; milliseconds and tokens per second."""
    gaps: list[float] = []
    tokens = 0
    for record in streams:
        gaps.extend(record.itl_s)
        tokens += len(record.chunks)
        if record.chunks and not record.ended:
            gaps.append(end - record.chunks[-1])
    waits = [(r.chunks[0] if r.chunks else end) - r.sent for r in prompts if r.sent]
    # Where nothing came at all, it took at least the whole time.
    gaps = gaps or [end - start]
    waits = waits or [end - start]
    return {
        "p99_itl_ms": float(np.percentile(gaps, 99)) * 1000.0,
        "median_itl_ms": float(np.median(gaps)) * 1000.0,
        "decode_throughput": tokens / (end - start),
        "median_ttft_ms": float(np.median(waits)) * 1000.0,
        "max_ttft_ms": max(waits) * 1000.0,
        "prompts": float(len(waits)),
    }
