"""The whole decoder over the kernels: the tokens of transformers, and bits without company."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from common.kv.pool import KvPool
from common.model.batch import Row, Sample
from common.model.decoder import Kernels
from common.model.triton.decoder import TritonDecoder
from common.model.triton.tuning import tuning_named
from common.sampling import SamplingParams
from tests.checkpoints import Architecture
from tests.common.model.drive import Driver, greedy_params, load, random_prompts
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal

MODELS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "llama with biases": ("llama", {"bias": True, "layers": 1}),
    "qwen3 with a window": ("qwen3", {"head_dim": 32, "sliding_window": 20, "layers": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(checkpoint: MakeCheckpoint, name: str) -> None:
    architecture, options = MODELS[name]
    directory = checkpoint(architecture, **options)
    prompts = random_prompts([1, 16, 37], 512)
    driver = Driver(load(directory), num_blocks=8, kernels="triton")
    runs = [driver.start(prompt, greedy_params(2)) for prompt in prompts]
    driver.finish(runs, budget=60)
    assert_greedy_equal(directory, prompts, [run.outputs for run in runs])


def test_random_draws_are_made_by_the_kernel(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of the reference, seed by seed."""
    drawn: list[int] = []
    kernel = TritonDecoder.draw_random

    def recorded(self: TritonDecoder, logits: torch.Tensor, samples: Sequence[Sample]) -> list[int]:
        tokens = kernel(self, logits, samples)
        drawn.extend(tokens)
        return tokens

    monkeypatch.setattr(TritonDecoder, "draw_random", recorded)
    loaded = load(checkpoint("llama", layers=1, vocab=512))
    prompts = random_prompts([3, 17], 512)
    answers = {}
    kernels: Kernels
    for kernels in ("torch", "triton"):
        driver = Driver(loaded, num_blocks=8, kernels=kernels)
        runs = [
            driver.start(prompt, SamplingParams(max_tokens=3, seed=seed, top_k=50, top_p=0.9))
            for seed, prompt in enumerate(prompts)
        ]
        driver.finish(runs, budget=60)
        answers[kernels] = [run.outputs for run in runs]
    assert answers["torch"] == answers["triton"]
    assert sorted(drawn) == sorted(token for outputs in answers["triton"] for token in outputs)


def test_invariant_mode_depends_on_neither_cuts_nor_company(checkpoint: MakeCheckpoint) -> None:
    loaded = load(checkpoint("llama", layers=1, vocab=64))
    [prompt] = random_prompts([36], 64)
    layout = loaded.spec.layout(16, "float32")
    pool = KvPool(layout, 8, poison=True)
    decoder = TritonDecoder(loaded.spec, loaded.weights, pool, batch_invariant=True)

    def run(*cuts: int, company: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        pool.tensor.fill_(float("nan"))
        start = 0
        logits = torch.empty(0)
        for cut in (*cuts, len(prompt)):
            rows = [Row(prompt[start:cut], start, [5, 2, 7])]
            if company:
                rows.insert(0, Row(prompt[:company], 0, [0, 1]))
            _, logits = decoder.compute(rows, [len(rows) - 1], [False])
            start = cut
        return pool.tensor[[5, 2, 7]].movedim(4, 1).flatten(0, 1)[:36].clone(), logits

    kv, logits = run()
    assert kv.isfinite().all() and logits.shape == (1, 64)
    for other in (run(35), run(7, 8), run(20, company=9)):
        assert torch.equal(other[0], kv) and torch.equal(other[1], logits)


def test_samples_of_a_mixed_step_keep_their_order(checkpoint: MakeCheckpoint) -> None:
    """Decode rows are computed before chunks; the answers are in the order of the rows."""
    loaded = load(checkpoint("mistral", layers=1))
    prompts = random_prompts([12, 5, 9], 512)
    answers = {}
    for kernels in ("torch", "triton"):
        driver = Driver(loaded, num_blocks=8, kernels=kernels)
        runs = [driver.start(prompt, greedy_params(2)) for prompt in prompts]
        driver.step(runs, [11, 5, 4])
        driver.step(runs, [1, 1, 5])
        answers[kernels] = [run.outputs for run in runs]
    assert answers["torch"] == answers["triton"] and all(answers["torch"])


def test_tables_of_devices() -> None:
    for name, key in (
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "other"),
    ):
        tuning = tuning_named(name)
        assert (tuning.name, tuning.timed) == (key, False)
        for kernel in ("prefill", "decode", "linear"):
            for head_dim in (64, 80, 128, 256):
                shape = tuning.shape(kernel, head_dim)
                assert shape.block_m >= 16 and shape.block_n >= 16
        # A size without an entry takes the smallest tiles.
        assert tuning.shape("prefill", 512).block_m == 32
