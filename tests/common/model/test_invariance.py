"""What the native kernels compute for a row must not depend on anything but its own tokens."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

from common.model.batch import Row, Sample
from common.model.load import Loaded
from common.sampling import SamplingParams
from tests.common.model.drive import Driver, load, random_prompts
from tests.conftest import MakeCheckpoint

LENGTH = 333
"""Of the row that is watched: past two partitions of its context, in the middle of a block."""
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "hidden": 96, "heads": 6, "kv_heads": 2},
    "qwen3 with a window": {"architecture": "qwen3", "head_dim": 24, "sliding_window": 150},
}
WATCHED = SamplingParams(max_tokens=1, temperature=0.0, logprobs=512)

Watched = tuple[torch.Tensor, tuple[tuple[int, float], ...]]
"""The KV of the row, and the log-probabilities of the whole vocabulary."""


def run(
    loaded: Loaded, prompt: Sequence[int], cuts: Sequence[int], others: int, threads: int
) -> Watched:
    """Compute `prompt` in chunks that end at `cuts`, every one among `others` rows."""
    driver = Driver(loaded, num_blocks=40 + 14 * others, kernels="native", threads=threads)
    pool, layout = driver.pool, driver.layout
    blocks = [driver.take_block() for _ in range(layout.blocks_for(len(prompt)))]
    random = Random(others)
    company = [
        (
            random_prompts([random.randint(1, 200)], 512, seed=i)[0],
            [driver.take_block() for _ in range(13)],
        )
        for i in range(others)
    ]
    start, result = 0, None
    for cut in (*cuts, len(prompt)):
        samples = (Sample(0, WATCHED, prompt, len(prompt)),) if cut == len(prompt) else ()
        rows = [Row(prompt[start:cut], start, blocks, samples)]
        rows += [Row(tokens, 0, table) for tokens, table in company]
        place = random.randrange(len(rows))
        rows[0], rows[place] = rows[place], rows[0]
        result = driver.runner.step(rows)[place]
        start = cut
    assert result is not None and result[0].logprob is not None
    # [block, layer, k|v, head, slot, dim] to [tokens, ...]
    kv = pool.tensor[blocks].movedim(4, 1).flatten(0, 1)[: len(prompt)]
    return kv.clone(), result[0].logprob.top


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_company_cuts_or_threads(
    checkpoint: MakeCheckpoint, name: str, dtype: str
) -> None:
    loaded = load(checkpoint(**MODELS[name], dtype=dtype), dtype)
    [prompt] = random_prompts([LENGTH], 512, seed=1)
    kv, logprobs = run(loaded, prompt, [], 0, 1)
    assert kv.isfinite().all()
    every = range(1, LENGTH)
    for cuts, others, threads in (
        ([], 0, 3),
        ([], 32, 2),
        ([LENGTH - 1], 0, 1),
        ([LENGTH - 1], 32, 2),
        ([100, 107, 128, 129, 300], 3, 1),
        (every, 0, 2),
    ):
        other_kv, other_logprobs = run(loaded, prompt, cuts, others, threads)
        assert torch.equal(kv, other_kv), (cuts, others, threads)
        assert logprobs == other_logprobs, (cuts, others, threads)
