"""A prefill and a decode worker with blocks of different sizes: the same tokens, and no block too
many shipped."""

import random

import pytest

from tests.client import complete, http
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal
from tests.redis_server import RedisServer
from tests.system.joining import joined, until_joined
from tests.system.prompts import tokens
from tests.system.serving import complete_all, deployment, settled, worker_metric

pytestmark = pytest.mark.system

LENGTHS = [1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 300]


@pytest.mark.parametrize(
    ("here", "there", "transport"),
    [(32, 16, "shm"), (16, 32, "tcp"), (32, 16, "zmq")],
)
async def test_sizes_that_differ_give_the_same_tokens(
    checkpoint: MakeCheckpoint, redis_server: RedisServer, here: int, there: int, transport: str
) -> None:
    model = checkpoint("llama")
    rng = random.Random(here)
    prompts = [tokens(rng, length) for length in LENGTHS]
    flags = ("--transport", transport, "--block-size")
    redis = redis_server.url
    with (
        deployment(model, *flags, str(there), "--redis", redis, prefill=0) as served,
        joined("prefill", model, redis, *flags, str(here)),
    ):
        async with http(served.url) as client:
            await until_joined(client, "prefill")
            answers = await complete_all(client, prompts, 4, max_tokens=24)
            assert_greedy_equal(model, prompts, [answer.ids for answer in answers])
            await settled(client, 15)
            shipped = await worker_metric(client, "tandem_transfer", counter="blocks_sent")
            # Each prompt has blocks of its own; the prefill worker may not have read them all.
            assert 0 < shipped <= sum(-(-length // there) for length in LENGTHS)

            prompt = tokens(rng, 200)
            first = await complete(client, prompt, max_tokens=8)
            await settled(client, 15)
            after = await worker_metric(client, "tandem_transfer", counter="blocks_sent")
            assert after - shipped == -(-200 // there)
            longer = [*prompt, *tokens(rng, 100)]
            second = await complete(client, longer, max_tokens=8)
            assert second.cached_tokens == 200 // here * here
            await settled(client, 15)
            final = await worker_metric(client, "tandem_transfer", counter="blocks_sent")
            # The decode worker holds what both answers and prompts have in common.
            assert final - after == -(-300 // there) - 200 // there
            assert_greedy_equal(model, [prompt, longer], [first.ids, second.ids])
            assert await worker_metric(client, "tandem_transfer", counter="digest_errors") == 0
