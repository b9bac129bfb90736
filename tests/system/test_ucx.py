"""Blocks that travel over UCX give the tokens of blocks that travel over zmq."""

import random

import pytest

from tests.client import http
from tests.conftest import MakeCheckpoint
from tests.kvtransfer.conftest import UCX
from tests.system.prompts import tokens
from tests.system.serving import complete_all, deployment, settled, worker_metric

pytestmark = [pytest.mark.system, *UCX.marks]


@pytest.mark.timeout(600)  # two deployments, each of which may take long to start
async def test_the_same_tokens_as_over_zmq(checkpoint: MakeCheckpoint) -> None:
    model = checkpoint("llama")
    rng = random.Random(5)
    prompts = [tokens(rng, length) for length in (1, 17, 64, 300, 700)]
    found = []
    for transport in ("zmq", "ucx"):
        with deployment(model, "--transport", transport) as served:
            async with http(served.url) as client:
                answers = await complete_all(client, prompts, 5, max_tokens=16, seed=3)
                await settled(client, 30)
                labels = {"counter": "bytes_received_over", "reason": transport}
                received = await worker_metric(client, "tandem_transfer", **labels)
        assert received > 0
        found.append([answer.tokens for answer in answers])
    assert found[0] == found[1]
