"""Clients that leave: nothing is leaked, nothing keeps running."""

import asyncio
import random

import pytest

from tests.client import Answer, complete, http, stream
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal
from tests.system.prompts import tokens
from tests.system.serving import deployment, metric, settled

pytestmark = pytest.mark.system

REQUESTS = 500


async def test_a_third_of_500_requests_cancelled_in_a_small_pool(
    checkpoint: MakeCheckpoint,
) -> None:
    """The pool holds about 20 of the requests; half of those that leave do so before their first
    token, the others in the middle of their stream."""
    model = checkpoint("llama")
    rng = random.Random(5)
    prompts = [tokens(rng, rng.choice((5, 16, 40, 100, 130))) for _ in range(REQUESTS)]
    kept: dict[int, Answer] = {}

    async with asyncio.timeout(200):
        with deployment(model, "--kv-blocks", "160", "--max-model-len", "1024") as served:
            async with http(served.url) as client:

                async def one(number: int) -> None:
                    await asyncio.sleep(rng.uniform(0, 6))
                    prompt = prompts[number]
                    match number % 6:
                        case 0:
                            leave = rng.randrange(1, 20)
                            await stream(client, prompt, max_tokens=800, stop_after=leave)
                        case 1:
                            ask = complete(client, prompt, max_tokens=800)
                            with pytest.raises(TimeoutError):
                                await asyncio.wait_for(ask, rng.uniform(0.01, 0.2))
                        case _:
                            kept[number] = await stream(client, prompt, max_tokens=24)

                await asyncio.gather(*(one(number) for number in range(REQUESTS)))
                report = await settled(client, 15)
                cancelled = await metric(
                    client, "tandem_router_requests_total", outcome="cancelled"
                )
    assert [a.error for a in kept.values() if a.error] == []
    # Those that leave in mid-stream for certain; the others may, on a busy machine, before the
    # router has read what they ask for.
    assert cancelled >= REQUESTS // 6
    assert report["total"]["num_blocks"] == 320
    sample = sorted(kept)[::10]
    assert_greedy_equal(
        model, [prompts[number] for number in sample], [kept[number].ids for number in sample]
    )
