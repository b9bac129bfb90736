"""Parity with transformers, and that tokens depend on nothing but prompt and parameters."""

from typing import Any

import pytest
import torch

from common.kv.pool import KvPool
from common.model.batch import Row, Sample
from common.model.decoder import Kernels
from common.model.runner import ModelRunner
from common.sampling import SamplingParams
from tests.checkpoints import ARCHITECTURES, Architecture
from tests.common.model.drive import Driver, greedy_params, load, random_prompts, run_greedy
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal, assert_teacher_forced

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 300)
LONG = (2_987, *LENGTHS)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
MODELS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases and llama3 rope": ("llama", {"bias": True, "rope_scaling": LLAMA3}),
    "llama with linear rope, multi-head": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "kv_heads": 4},
    ),
    "tied llama with yarn, one kv head": (
        "llama",
        {"rope_scaling": YARN, "tied": True, "kv_heads": 1},
    ),
    "mistral": ("mistral", {"head_dim": 24}),
    "mistral with a window": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {"rope_theta": 1_000_000.0}),
    "tied qwen2 with a window in half of the layers": (
        "qwen2",
        {"tied": True, "sliding_window": 40},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 with biases and a window": ("qwen3", {"bias": True, "sliding_window": 25}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_float32_tokens_are_those_of_transformers(
    checkpoint: MakeCheckpoint, kernels: Kernels, name: str, block_size: int
) -> None:
    architecture, options = MODELS[name]
    directory = checkpoint(architecture, **options)
    prompts = random_prompts(LENGTHS, 512, seed=block_size)
    outputs = run_greedy(load(directory), prompts, 6, block_size=block_size, kernels=kernels)
    assert_greedy_equal(directory, prompts, outputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_long_prompt_among_short_ones(
    checkpoint: MakeCheckpoint, kernels: Kernels, architecture: Architecture
) -> None:
    directory = checkpoint(architecture)
    prompts = random_prompts(LONG, 512)
    outputs = run_greedy(load(directory), prompts, 4, kernels=kernels)
    assert_greedy_equal(directory, prompts, outputs)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_tokens_are_within_rounding(
    checkpoint: MakeCheckpoint, kernels: Kernels, name: str
) -> None:
    architecture, options = MODELS[name]
    directory = checkpoint(architecture, dtype="bfloat16", **options)
    prompts = random_prompts(LENGTHS, 512, seed=3)
    outputs = run_greedy(load(directory, "bfloat16"), prompts, 6, kernels=kernels)
    assert_teacher_forced(directory, prompts, outputs)


@pytest.mark.parametrize("block_size", [16, 32])
def test_sequences_share_the_blocks_of_a_prefix(
    checkpoint: MakeCheckpoint, kernels: Kernels, block_size: int
) -> None:
    directory = checkpoint("qwen3", sliding_window=40)
    loaded = load(directory)
    prefix, *tails = random_prompts([70, 1, 9, 40], 512)
    prompts = [prefix, *(prefix + tail for tail in tails), prefix[:33]]
    driver = Driver(loaded, block_size=block_size, num_blocks=40, kernels=kernels)
    first = driver.start(prompts[0], greedy_params(6))
    driver.finish([first])
    others = [driver.start(prompt, greedy_params(6), shared=first) for prompt in prompts[1:]]
    full = 70 // block_size
    assert [run.num_computed // block_size for run in others] == [
        full,
        full,
        full,
        32 // block_size,
    ]
    assert others[0].blocks[:full] == others[1].blocks[:full] == first.blocks[:full]
    driver.finish(others)
    assert_greedy_equal(directory, prompts, [run.outputs for run in (first, *others)])


def test_sampled_tokens_depend_on_nothing_but_the_request(
    checkpoint: MakeCheckpoint, kernels: Kernels
) -> None:
    loaded = load(checkpoint("llama"))
    prompts = random_prompts([5, 16, 33, 100], 512)
    parameters = SamplingParams(
        max_tokens=12,
        temperature=0.9,
        top_p=0.95,
        top_k=50,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        min_tokens=12,
        seed=123,
    )

    def run(block_size: int, seed: int, budget: int) -> list[list[int]]:
        driver = Driver(loaded, block_size=block_size, num_blocks=40, seed=seed, kernels=kernels)
        runs = [driver.start(prompt, parameters) for prompt in prompts]
        driver.finish(runs, budget=budget)
        return [run.outputs for run in runs]

    together = run(16, 0, 40)
    assert together == run(32, 1, 7) == run(16, 2, 500)
    assert not {0, 2} & {token for tokens in together for token in tokens}  # end of sequence

    # Continued elsewhere after five tokens: the rest is the same.
    driver = Driver(loaded, num_blocks=20, kernels=kernels)
    resumed = driver.start(prompts[2], parameters)
    resumed.tokens += together[2][:5]
    driver.finish([resumed])
    assert resumed.outputs == together[2]


def test_choices_of_one_row_and_rows_without_samples(
    checkpoint: MakeCheckpoint, kernels: Kernels
) -> None:
    loaded = load(checkpoint("mistral"))
    driver = Driver(loaded, num_blocks=8, kernels=kernels)
    runner = driver.runner
    prompt = random_prompts([20], 512)[0]
    parameters = SamplingParams(max_tokens=4, temperature=1.5, seed=8, logprobs=2)
    samples = tuple(Sample(choice, parameters, prompt, 20) for choice in range(6))
    [first, second] = runner.step(
        [Row(prompt[:10], 0, [5, 6]), Row(prompt, 0, [1, 2], samples)],
    )
    assert first == ()
    assert len({sampled.token for sampled in second}) > 1
    tops = {sampled.logprob.top for sampled in second if sampled.logprob is not None}
    assert len(tops) == 1 and len(tops.pop()) == 2
    # Each choice alone draws what it drew among the others.
    for sample, sampled in zip(samples, second, strict=True):
        [[alone]] = runner.step([Row(prompt[19:], 19, [1, 2], (sample,))])
        assert alone.token == sampled.token
    assert runner.step([]) == []
    assert not runner.overlaps
    row = Row(prompt[19:], 19, [1, 2], (sample,))
    assert runner.launch([row]).collect() == [(alone,)]


def test_a_fork_writes_its_own_copy_of_the_tail(
    checkpoint: MakeCheckpoint, kernels: Kernels
) -> None:
    directory = checkpoint("llama")
    driver = Driver(load(directory), num_blocks=16, kernels=kernels)
    prompt = random_prompts([20], 512)[0]
    one = driver.start(prompt, greedy_params(10))
    driver.step([one], [20])
    other = driver.start(prompt, greedy_params(10), shared=one)
    driver.runner.copy_block(one.blocks[1], other.blocks[1])
    other.tokens.append((one.tokens[-1] + 1) % 512)
    other.num_computed = 20
    driver.finish([one, other])
    forked = [*prompt, other.outputs[0]]
    assert_greedy_equal(directory, [prompt, forked], [one.outputs, other.outputs[1:]])


def test_a_pool_of_another_model_is_a_mistake(checkpoint: MakeCheckpoint) -> None:
    loaded = load(checkpoint("llama"))
    layout = loaded.spec.layout(16, "bfloat16")
    with pytest.raises(AssertionError):
        ModelRunner(loaded.spec, loaded.weights, KvPool(layout, 2))


def test_free_slots_are_never_read(checkpoint: MakeCheckpoint, kernels: Kernels) -> None:
    """After every step all slots without a token are poisoned anew, reused blocks included."""
    directory = checkpoint("mistral", sliding_window=40)
    driver = Driver(load(directory), num_blocks=30, kernels=kernels)
    prompts = random_prompts([3, 16, 47, 100], 512)
    runs = [driver.start(prompt, greedy_params(5)) for prompt in prompts]
    while active := [run for run in runs if not run.done]:
        driver.step(active, [min(30, len(run.tokens) - run.num_computed) for run in active])
        held = torch.zeros(driver.pool.num_blocks, 16, dtype=torch.bool)
        for run in runs:
            for position in range(run.num_computed):
                held[run.blocks[position // 16], position % 16] = True
        driver.pool.tensor.masked_fill_(~held[:, None, None, None, :, None], float("nan"))
    assert_greedy_equal(directory, prompts, [run.outputs for run in runs])
