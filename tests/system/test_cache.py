"""A repeated prompt: computed once, shipped once, and the answer says so."""

import random

import httpx
import pytest

from tests.client import complete, http
from tests.conftest import MakeCheckpoint
from tests.system.prompts import tokens
from tests.system.serving import deployment, settled, worker_metric

pytestmark = pytest.mark.system


async def figures(client: httpx.AsyncClient) -> tuple[float, float]:
    """(prompt tokens computed, blocks shipped) of all workers so far."""
    await settled(client, 10)
    computed = await worker_metric(client, "tandem_prompt_tokens_total", source="computed")
    return computed, await worker_metric(client, "tandem_transfer", counter="blocks_sent")


async def test_second_request_computes_and_ships_only_the_rest(checkpoint: MakeCheckpoint) -> None:
    rng = random.Random(3)
    prompt = tokens(rng, 2000)
    with deployment(checkpoint("llama"), "--block-size", "16") as served:
        async with http(served.url) as client:
            first = await complete(client, prompt, max_tokens=8)
            computed, shipped = await figures(client)
            assert first.usage["prompt_tokens"] == 2000
            assert first.cached_tokens == 0
            assert shipped == 125

            # The same prompt: one block is computed again, since a token must be.
            again = await complete(client, prompt, max_tokens=8)
            computed_again, shipped_again = await figures(client)
            assert again.tokens == first.tokens
            assert again.cached_tokens == 1984
            assert computed_again - computed == 16
            assert shipped_again == shipped

            # The same prompt and a little more: the new part is computed and shipped.
            longer = await complete(client, [*prompt, *tokens(rng, 100)], max_tokens=8)
            computed_longer, shipped_longer = await figures(client)
            assert longer.cached_tokens == 2000
            assert computed_longer - computed_again == 100
            assert shipped_longer - shipped_again == 7
