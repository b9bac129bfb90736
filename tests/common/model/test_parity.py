"""The checkers of `tests.parity` must fail on the smallest mistakes an engine could make."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.model.decoder import Kernels
from common.model.rope import Rotary, apply_rotary
from tests.checkpoints import ARCHITECTURES, Architecture
from tests.common.model.drive import Driver, Run, greedy_params, load, random_prompts, run_greedy
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal, assert_teacher_forced

PROMPT = random_prompts([60], 512, seed=5)[0]
NUM_TOKENS = 12
CHECKS = {"float32": assert_greedy_equal, "bfloat16": assert_teacher_forced}
Damage = Callable[[Driver, Run, Run], None]


def nothing(driver: Driver, run: Run, other: Run) -> None:
    """No damage."""


def swap_blocks(driver: Driver, run: Run, other: Run) -> None:
    """One KV block changes places with that of another sequence. (Two full blocks of the same
    sequence may change places: their keys are rotated already, and a sum has no order.)"""
    pair = [run.blocks[1], other.blocks[1]]
    driver.pool.tensor[pair] = driver.pool.tensor[pair[::-1]]


def shift_block(driver: Driver, run: Run, other: Run) -> None:
    """The keys of one block as they were if its chunk had begun one position later."""
    spec = driver.runner.spec
    rotary = Rotary(spec.rope, spec.head_dim, torch.device("cpu"))
    keys = driver.pool.tensor[run.blocks[1], :, 0]  # [layer, kv_head, slot, head_dim]
    heads = keys.reshape(-1, 1, spec.head_dim)
    apply_rotary(heads, *rotary.tables(torch.tensor([1]), keys.dtype))
    keys.copy_(heads.view(keys.shape))


def run_damaged(directory: Path, dtype: str, damage: Damage, kernels: Kernels) -> list[int]:
    """Greedy tokens after a prefill whose KV was damaged before the first decode step."""
    driver = Driver(load(directory, dtype), num_blocks=10, kernels=kernels)
    run = driver.start(PROMPT, greedy_params(NUM_TOKENS))
    other = driver.start(PROMPT[::-1], greedy_params(NUM_TOKENS))
    driver.step([run, other], [60, 60])
    damage(driver, run, other)
    driver.finish([run])
    return run.outputs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", CHECKS)
@pytest.mark.parametrize("damage", [swap_blocks, shift_block])
def test_damaged_kv_is_found(
    checkpoint: MakeCheckpoint,
    kernels: Kernels,
    architecture: Architecture,
    dtype: str,
    damage: Damage,
) -> None:
    directory = checkpoint(architecture, dtype=dtype)
    CHECKS[dtype](directory, [PROMPT], [run_damaged(directory, dtype, nothing, kernels)])
    with pytest.raises(AssertionError, match="prompt 0 of 60 tokens: output "):
        CHECKS[dtype](directory, [PROMPT], [run_damaged(directory, dtype, damage, kernels)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", CHECKS)
def test_one_changed_prompt_token_is_found(
    checkpoint: MakeCheckpoint, kernels: Kernels, architecture: Architecture, dtype: str
) -> None:
    directory = checkpoint(architecture, dtype=dtype)
    for position in (0, 30, 58):
        changed = PROMPT.copy()
        changed[position] = (changed[position] + 1) % 512
        outputs = run_greedy(load(directory, dtype), [changed], NUM_TOKENS, kernels=kernels)
        CHECKS[dtype](directory, [changed], outputs)
        with pytest.raises(AssertionError, match="prompt 0 of 60 tokens: output "):
            CHECKS[dtype](directory, [PROMPT], outputs)


def test_one_wrong_token_is_found_where_it_is(checkpoint: MakeCheckpoint, kernels: Kernels) -> None:
    directory = checkpoint("llama")
    prompts = [PROMPT, PROMPT[:7]]
    outputs = run_greedy(load(directory), prompts, NUM_TOKENS, kernels=kernels)
    outputs[1][4] = (outputs[1][4] + 1) % 512
    for check in CHECKS.values():
        with pytest.raises(AssertionError, match=r"prompt 1 of 7 tokens: output 4 is "):
            check(directory, prompts, outputs)
