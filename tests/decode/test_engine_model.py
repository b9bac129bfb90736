"""Both engines in one process with a tiny real model in float32: the tokens are the same in every
topology, block size and cache state, preempted or not."""

import random
from pathlib import Path

import pytest

from common.kv.blocks import BlockManager
from common.kv.pool import KvPool
from common.metrics import WorkerMetrics
from common.model.load import Loaded, open_model
from common.model.runner import ModelRunner
from common.sampling import SamplingParams
from common.schedule import Limits
from decode.engine import DecodeEngine
from prefill.engine import PrefillEngine
from tests.conftest import MakeCheckpoint
from tests.pair import Pair, Wire

NUM_TOKENS = 24
Tokens = dict[tuple[int, int], list[int]]


@pytest.fixture(scope="module")
def loaded(checkpoint: MakeCheckpoint) -> Loaded:
    directory: Path = checkpoint("llama")
    return open_model(str(directory), None, "float32", "cpu")


def parts(
    loaded: Loaded, role: str, num_blocks: int, block_size: int
) -> tuple[ModelRunner, BlockManager, Limits, WorkerMetrics]:
    layout = loaded.spec.layout(block_size, loaded.dtype_name)
    runner = ModelRunner(loaded.spec, loaded.weights, KvPool(layout, num_blocks, poison=True))
    limits = Limits(
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        max_model_len=512,
        vocab_size=loaded.spec.vocab_size,
        eos_token_ids=loaded.spec.eos_token_ids,
        content_id="tiny",
    )
    return runner, BlockManager(num_blocks), limits, WorkerMetrics(role)


def make_pair(loaded: Loaded, num_blocks: int, block_size: int) -> Pair:
    prefill_parts = parts(loaded, "prefill", 40, block_size)
    decode_parts = parts(loaded, "decode", num_blocks, block_size)
    wire = Wire(prefill_parts[0].pool, decode_parts[0].pool)
    return Pair(PrefillEngine(*prefill_parts), DecodeEngine(*decode_parts), wire)


def tokens_of(pair: Pair, *, local: bool, seed: int = 0) -> Tokens:
    """Eight requests at once: greedy and seeded, one with three choices, two with one prefix."""
    rng = random.Random(3)
    prompts = [rng.choices(range(3, 250), k=n) for n in (1, 15, 16, 33, 40, 64)]
    prompts += [prompts[5] + [7, 8, 9], prompts[5][:50]]
    first = 100 * seed
    for i, prompt in enumerate(prompts, first):
        params = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=float(i % 2), seed=i % 100, ignore_eos=True
        )
        choices = (0, 1, 2) if i % 100 == 3 else (0,)
        pair.submit(i, prompt, params, choices=choices, local=local)
    pair.run()
    pair.assert_quiet()
    assert pair.failed == {}
    return {
        (request % 100, choice): stream.tokens
        for (request, _, choice), stream in pair.streams.items()
        if request // 100 == seed
    }


def test_same_tokens_everywhere(loaded: Loaded) -> None:
    colocated = Pair(None, DecodeEngine(*parts(loaded, "decode", 80, 16)), None)
    expected = tokens_of(colocated, local=True)
    assert len(expected) == 10 and all(len(t) == NUM_TOKENS for t in expected.values())
    assert len({tuple(expected[3, choice]) for choice in range(3)}) == 3
    assert tokens_of(colocated, local=True, seed=1) == expected  # from a warm cache

    pair = make_pair(loaded, 80, 16)
    assert tokens_of(pair, local=False) == expected
    assert tokens_of(pair, local=False, seed=1) == expected
    assert tokens_of(make_pair(loaded, 40, 32), local=False) == expected

    tiny = make_pair(loaded, 9, 16)
    assert tokens_of(tiny, local=False) == expected
    assert tiny.decode.metrics.preemptions._value.get() > 0
