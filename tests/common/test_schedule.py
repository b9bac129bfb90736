"""Chunk sizes, blocks of a starting sequence, sealing, and when a choice ends."""

import dataclasses

import pytest

from common.blockhash import UNIT, chain, pack_tokens, seed
from common.errors import ProtocolError
from common.kv.blocks import BlockManager
from common.messages import Output, Prefill, TokenLogprob
from common.model.batch import Sampled
from common.sampling import SamplingParams
from common.schedule import (
    Chunk,
    advance,
    chunk_size,
    finish_reason,
    start,
    stop,
    to_output,
    to_sequence,
)
from common.sequence import Sequence
from tests.stub import EOS, VOCAB, stub_limits

LIMITS = stub_limits(8, max_model_len=200)


def work(tokens: list[int], prompt_len: int | None = None, **params: int) -> Prefill:
    return Prefill(
        request=1,
        attempt=2,
        tokens=pack_tokens(tokens),
        prompt_len=prompt_len or len(tokens),
        choices=(0,),
        params=SamplingParams(**({"max_tokens": 10} | params)),  # type: ignore[arg-type]
        salt="tenant",
    )


def sequence(length: int, prompt_len: int | None = None, **params: int) -> Sequence:
    return to_sequence(work([*range(length)], prompt_len, **params), b"r", LIMITS)


@pytest.mark.parametrize(
    ("computed", "length", "budget", "size"),
    [
        (0, 10, 10, 10),
        (0, 100, 64, 64),
        (0, 100, 60, 48),  # ends at a block
        (48, 100, 20, 16),
        (48, 100, 60, 52),
        (0, 100, 10, 10),  # no block boundary within reach
        (10, 100, 10, 6),
        (16, 100, 0, 0),
    ],
)
def test_chunk_size(computed: int, length: int, budget: int, size: int) -> None:
    s = sequence(length)
    s.num_computed = computed
    assert chunk_size(s, budget, 16) == size


def test_hashes_are_chained_from_model_and_salt() -> None:
    s = sequence(50)
    assert s.hashes == chain(pack_tokens([*range(48)]), seed("stub", "tenant"))
    wide = dataclasses.replace(LIMITS, block_size=2 * UNIT)
    assert to_sequence(work([*range(50)]), b"r", wide).hashes == [s.hashes[1]]


@pytest.mark.parametrize(
    "bad",
    [
        Prefill(**{**{f: getattr(work([1]), f) for f in work([1]).__struct_fields__}, **change})
        for change in (
            {"tokens": b"123"},
            {"tokens": b""},
            {"prompt_len": 0},
            {"prompt_len": 2},
            {"tokens": pack_tokens([VOCAB])},
            {"tokens": pack_tokens([-1])},
            {"tokens": pack_tokens([1] * 200)},
            {"choices": ()},
            {"choices": (1, 1)},
            {"tokens": pack_tokens([1, 2]), "params": SamplingParams(max_tokens=1)},
        )
    ],
)
def test_impossible_work(bad: Prefill) -> None:
    with pytest.raises(ProtocolError):
        to_sequence(bad, b"r", LIMITS)


def test_start_takes_cached_blocks_first_and_computes_one_token_at_least() -> None:
    blocks = BlockManager(8)
    first = sequence(48)
    assert start(first, blocks, LIMITS) and first.blocks == [0, 1, 2]
    advance(first, 20, blocks, 16)
    advance(first, 28, blocks, 16)
    second = sequence(48)
    assert start(second, blocks, LIMITS) and second.blocks == [0, 1, 3]
    assert second.num_computed == second.num_cached == 32
    stop(first, blocks)
    assert first.blocks == [] and blocks.ledger().cached == 1
    stop(second, blocks)
    assert blocks.ledger().cached == 3 and blocks.ledger().in_use == 0


def test_start_is_all_or_nothing_with_headroom() -> None:
    blocks = BlockManager(4)
    s = sequence(48)
    assert not start(s, blocks, LIMITS, headroom=2)
    assert s.blocks == [] and blocks.num_available == 4
    assert start(s, blocks, LIMITS, headroom=1)


def test_generated_tokens_are_sealed_too() -> None:
    blocks = BlockManager(2)
    s = sequence(30)
    assert start(s, blocks, LIMITS)
    advance(s, 30, blocks, 16)
    s.tokens += [7, 8]
    advance(s, 1, blocks, 16)
    assert len(blocks.cached_hashes()) == 1
    advance(s, 1, blocks, 16)
    expected = chain(pack_tokens([*range(30), 7, 8]), seed("stub", "tenant"))
    assert blocks.cached_hashes() == expected == s.hashes


def test_prompt_tokens_of_a_chunk() -> None:
    s = sequence(50, prompt_len=40, max_tokens=20)
    assert Chunk(s, 30).num_prompt_tokens == 30
    s.num_computed = 30
    assert Chunk(s, 20).num_prompt_tokens == 10
    s.num_computed = 49
    assert Chunk(s, 1).num_prompt_tokens == 0


def test_most_tokens() -> None:
    assert LIMITS.most_tokens(sequence(40)) == 49  # the last token's KV is never needed
    assert LIMITS.most_tokens(sequence(198)) == 199  # capped by max_model_len
    assert LIMITS.blocks_for(49) == 4


def ends(s: Sequence, token: int, **params: object) -> tuple[str, int]:
    s.params = SamplingParams(**({"max_tokens": 10} | params))  # type: ignore[arg-type]
    return finish_reason(s, token, LIMITS)


def test_finish_reason() -> None:
    s = sequence(12, prompt_len=10)
    assert ends(s, 5) == ("", -1)
    assert ends(s, EOS) == ("stop", -1)
    assert ends(s, EOS, ignore_eos=True) == ("", -1)
    assert ends(s, EOS, stop_token_ids=(EOS,), ignore_eos=True) == ("stop", EOS)
    assert ends(s, 5, stop_token_ids=(5,)) == ("stop", 5)
    assert ends(s, 5, stop_token_ids=(5,), min_tokens=3) == ("", -1)
    assert ends(s, 5, stop_token_ids=(5,), min_tokens=2) == ("stop", 5)
    assert ends(s, 5, max_tokens=3) == ("length", -1)
    assert ends(s, EOS, max_tokens=3) == ("stop", -1)
    assert ends(sequence(199, prompt_len=195), 5) == ("length", -1)


def test_to_output() -> None:
    logprob = TokenLogprob(5, -0.5)
    one = sequence(12, prompt_len=10)
    one.taken, one.began = 1.0, 1.5
    output = to_output(one, 3, Sampled(5, logprob), LIMITS, 16, 3.5)
    common = {"logprobs": (logprob,), "cached_tokens": 16}
    assert output == Output(1, 2, 3, 2, (5,), **common, timing=(0.5, 2.0))  # type: ignore[arg-type]
