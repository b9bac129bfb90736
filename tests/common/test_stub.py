"""The stub model notices what the tests rely on it to notice."""

import pytest

from common.model.batch import Row, Sample
from common.sampling import SamplingParams
from tests.stub import StubPool, StubRunner, stub_token

PARAMS = SamplingParams(max_tokens=5, seed=3)


def prompt_row(tokens: list[int], blocks: list[int], start: int = 0) -> Row:
    return Row(tokens[start:], start, blocks, (Sample(0, PARAMS, tokens, len(tokens)),))


def test_tokens_follow_seed_choice_and_position() -> None:
    runner = StubRunner(StubPool(4))
    ((sampled,),) = runner.step([prompt_row([*range(20)], [2, 0])])
    assert sampled.token == stub_token(3, 0, 20)


@pytest.mark.parametrize("change", ["foreign", "missing", "half", "position"])
def test_wrong_kv_is_noticed(change: str) -> None:
    runner = StubRunner(StubPool(4))
    tokens = [*range(20)]
    runner.step([Row(tokens[:16], 0, [0], ()), Row([5] * 16, 0, [2], ())])
    blocks = [0, 1]
    match change:
        case "foreign":
            blocks[0] = 2
        case "missing":
            blocks[0] = 3
        case "half":
            runner.pool.slab(0)[256:272] = bytes(16)
        case "position":
            tokens[0], tokens[1] = 1, 0
    with pytest.raises(AssertionError, match="foreign KV"):
        runner.step([prompt_row(tokens, blocks, start=16)])


def test_two_rows_must_not_write_one_slot() -> None:
    runner = StubRunner(StubPool(4))
    with pytest.raises(AssertionError, match="two rows"):
        runner.step([prompt_row([1, 2], [0]), prompt_row([1, 2], [0])])
