"""Pools that transports cannot reach, as on GPUs: the same tokens, and no slot or block is lost."""

import asyncio
import os
import random
import signal

import httpx
import pytest

from tests.client import Answer, complete, http, stream
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal
from tests.system.prompts import tokens
from tests.system.serving import complete_all, deployment, settled, worker_metric

pytestmark = pytest.mark.system

STAGED = ("--stage-kv", "--stage-memory", "1K")
"""As few slots as there can be: 16 in each direction."""
PATIENT = ("--dead-after", "30", "--stall-s", "30", "--lease-s", "60", "--router-silence-s", "60")
"""Nobody is given up because the machine is busy: a lone decode worker that is fails requests."""
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "n": 2}


async def slots_free(client: httpx.AsyncClient) -> None:
    """Until no slot of any worker is taken; there must be some."""
    assert await worker_metric(client, "tandem_transfer", counter="slots") > 0
    async with asyncio.timeout(30):
        while await worker_metric(client, "tandem_transfer", counter="slots_taken"):
            await asyncio.sleep(0.05)


@pytest.mark.timeout(600)  # two deployments, each of which may take long to start
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_staged_pools_change_no_token(checkpoint: MakeCheckpoint, transport: str) -> None:
    model = checkpoint("llama")
    rng = random.Random(3)
    common = tokens(rng, 70)
    prompts = [tokens(rng, length) for length in (1, 15, 16, 17, 33, 700)]
    prompts += [common + tokens(rng, rng.randrange(1, 60)) for _ in range(6)]
    found = []
    count = 1 if transport == "shm" else 2
    for flags in ((), STAGED):
        with deployment(
            model, "--transport", transport, *PATIENT, *flags, prefill=count, decode=count
        ) as served:
            async with http(served.url) as client:
                greedy = await complete_all(client, prompts, 12, max_tokens=12)
                drawn = await complete_all(client, prompts, 12, max_tokens=12, **SAMPLED)
                await settled(client, 30)
                labels = {"counter": "bytes_received_over", "reason": transport}
                assert await worker_metric(client, "tandem_transfer", **labels) > 0
                if flags:
                    await slots_free(client)
        found.append([[a.tokens for a in answers] for answers in (greedy, drawn)])
    assert_greedy_equal(model, prompts, [answer.ids for answer in greedy])
    assert found[0] == found[1]


async def test_aborts_and_a_kill(checkpoint: MakeCheckpoint) -> None:
    model = checkpoint("llama")
    rng = random.Random(4)
    prompts = [tokens(rng, 900) for _ in range(10)]
    flags = ("--max-num-batched-tokens", "64", *STAGED)
    with deployment(model, *flags, prefill=2) as served:
        async with http(served.url) as client:
            expected = await complete_all(client, prompts[:2], 2, max_tokens=6)
            # Clients that leave at some moment of the prompt.
            running = [
                asyncio.create_task(stream(client, prompt, max_tokens=6)) for prompt in prompts[2:]
            ]
            for task in running[:5]:
                await asyncio.sleep(rng.random() / 20)
                task.cancel()
            os.kill(served.pid("prefill-0"), signal.SIGKILL)
            for result in await asyncio.gather(*running[:5], return_exceptions=True):
                # One that was quicker than its client's patience has its answer.
                assert isinstance(result, asyncio.CancelledError | Answer), result
            answers = await asyncio.gather(*running[5:])
            assert [answer.error for answer in answers] == [None] * 3
            for i in range(2):
                again = await complete(client, prompts[i], max_tokens=6)
                assert again.tokens == expected[i].tokens
            await settled(client, 30)
            await slots_free(client)
    assert_greedy_equal(model, prompts[5 + 2 :], [answer.ids for answer in answers])
