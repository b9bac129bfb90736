"""A conversation goes on at a worker that has not read it: it fetches the blocks, by the router's
own choice, and the answer is the same."""

import random

import pytest

from tests.client import complete, http
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal
from tests.redis_server import RedisServer
from tests.system.joining import joined, until_joined
from tests.system.prompts import tokens
from tests.system.serving import HANDED_OVER, deployment, metric, settled, worker_metric

pytestmark = pytest.mark.system

TALKS = 5
"""A fetch that takes longer than it was to save is given up: on a starved machine some are."""


@pytest.mark.parametrize("transport", ["shm", "tcp", "zmq"])
async def test_a_prefill_worker_fetches_from_the_decode_worker(
    checkpoint: MakeCheckpoint, redis_server: RedisServer, transport: str
) -> None:
    """P from D: it joins after the first turns, which the decode worker served alone."""
    model, redis = checkpoint("llama"), redis_server.url
    rng = random.Random(1)
    flags = ("--transport", transport)
    with deployment(model, "--redis", redis, *flags, *HANDED_OVER, prefill=0) as served:
        async with http(served.url) as client:
            talks = []
            for _ in range(TALKS):
                prompt = tokens(rng, 2000)
                talks.append(prompt + (await complete(client, prompt, max_tokens=40)).ids)
            with joined("prefill", model, redis, *flags):
                await until_joined(client, "prefill")
                fetched, answers = 0.0, []
                for talk in talks:
                    answers.append(await complete(client, talk, max_tokens=8))
                    fetched = await worker_metric(client, "tandem_fetched_tokens_total")
                    if fetched:
                        break
                asked = len(answers)
                await settled(client, 15)
                assert await metric(client, "tandem_router_fetches_total") == asked
                # The last token of an answer has no KV yet, and blocks are 16 tokens.
                assert fetched == answers[-1].cached_tokens == (len(talks[0]) - 1) // 16 * 16
                assert await worker_metric(client, "tandem_transfer", counter="digest_errors") == 0
                assert_greedy_equal(model, talks[:asked], [answer.ids for answer in answers])
