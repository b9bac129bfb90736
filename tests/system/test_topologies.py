"""The tokens do not depend on where they are computed."""

import random
from collections.abc import Sequence

import pytest

from tests.client import Answer, http
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal
from tests.system.prompts import tokens
from tests.system.serving import complete_all, deployment, settled, worker_metric

pytestmark = pytest.mark.system

OUTPUT = 24
SAMPLED = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "seed": 1234,
    "n": 2,
}


def some_prompts() -> list[list[int]]:
    """32 prompts; some share a prefix, some end at a block border."""
    rng = random.Random(7)
    common = tokens(rng, 70)
    lengths = [1, 15, 16, 17, 31, 32, 33, 64, 100, 128, 300, 513]
    prompts = [tokens(rng, length) for length in lengths]
    prompts += [common + tokens(rng, rng.randrange(1, 60)) for _ in range(20)]
    return prompts


async def answers_of(url: str, prompts: Sequence[list[int]]) -> list[list[dict[int, list[int]]]]:
    """Tokens of all prompts: greedy cold, greedy hot, sampled; 32 in flight."""
    async with http(url) as client:
        runs: list[list[Answer]] = []
        for params in ({}, {}, SAMPLED):
            runs.append(await complete_all(client, prompts, 32, max_tokens=OUTPUT, **params))
        await settled(client, 15)
    return [[answer.tokens for answer in run] for run in runs]


@pytest.mark.timeout(600)  # three deployments, each of which may take long to start
async def test_every_topology_gives_the_same_tokens(checkpoint: MakeCheckpoint) -> None:
    model = checkpoint("llama")
    prompts = some_prompts()
    with deployment(model, prefill=0) as served:
        cold, hot, sampled = await answers_of(served.url, prompts)
    assert_greedy_equal(model, prompts, [answer[0] for answer in cold])
    assert hot == cold
    assert all(len(tokens) == OUTPUT for answer in sampled for tokens in answer.values())
    assert any(answer[0] != answer[1] for answer in sampled), "two choices draw alike"

    # 2P2D with blocks of 32 tokens; 1P1D with a decode pool that makes sequences preempt.
    for prefill, decode, flags in (
        (1, 1, ()),
        (2, 2, ("--block-size", "32")),
    ):
        with deployment(model, *flags, prefill=prefill, decode=decode) as served:
            assert await answers_of(served.url, prompts) == [cold, hot, sampled], flags


async def test_preemption_changes_no_token(checkpoint: MakeCheckpoint) -> None:
    """A pool of 48 blocks (768 tokens): far less than what the requests need together."""
    model = checkpoint("llama")
    rng = random.Random(11)
    prompts = [tokens(rng, rng.randrange(20, 60)) for _ in range(24)]
    with deployment(model, "--kv-blocks", "48", "--max-model-len", "512") as served:
        async with http(served.url) as client:
            answers = await complete_all(client, prompts, 24, max_tokens=100)
            report = await settled(client, 15)
            preempted = await worker_metric(client, "tandem_preemptions_total")
    assert {worker["num_blocks"] for worker in report["workers"].values()} == {48}
    assert preempted > 0
    assert_greedy_equal(model, prompts, [answer.ids for answer in answers])
