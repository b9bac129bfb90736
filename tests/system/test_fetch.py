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

TALK = 2000


@pytest.mark.parametrize("transport", ["shm", "tcp", "zmq"])
async def test_a_prefill_worker_fetches_from_the_decode_worker(
    checkpoint: MakeCheckpoint, redis_server: RedisServer, transport: str
) -> None:
    """P from D: it joins after the first turn, which the decode worker served alone."""
    model, redis = checkpoint("llama"), redis_server.url
    prompt = tokens(random.Random(1), TALK)
    flags = ("--transport", transport)
    with deployment(model, "--redis", redis, *flags, *HANDED_OVER, prefill=0) as served:
        async with http(served.url) as client:
            first = await complete(client, prompt, max_tokens=40)
            with joined("prefill", model, redis, *flags):
                await until_joined(client, "prefill")
                talk = [*prompt, *first.ids]
                second = await complete(client, talk, max_tokens=8)
                await settled(client, 15)
                assert await metric(client, "tandem_router_fetches_total") == 1
                # The last token of an answer has no KV yet, and blocks are 16 tokens.
                assert second.cached_tokens == (len(talk) - 1) // 16 * 16
                fetched = await worker_metric(client, "tandem_fetched_tokens_total")
                assert fetched == second.cached_tokens
                assert await worker_metric(client, "tandem_transfer", counter="digest_errors") == 0
                assert_greedy_equal(model, [prompt, talk], [first.ids, second.ids])
