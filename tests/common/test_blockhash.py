"""Chained block hashes: fixed values, continuation, and what separates two chains."""

import random
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blockhash import HASH_BYTES, UNIT, BlockHash, chain, pack_tokens, seed, unpack_tokens

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5 * UNIT)
PARENTS = st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES).map(BlockHash)


@settings(deadline=None, derandomize=True)
@given(tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_packing_is_reversible(tokens: list[int]) -> None:
    data = pack_tokens(tokens)
    assert len(data) == 4 * len(tokens)
    assert unpack_tokens(data) == tokens


def test_packing_is_little_endian() -> None:
    assert pack_tokens([1, 258]) == bytes.fromhex("0100000002010000")
    with pytest.raises(ValueError, match="multiple"):
        unpack_tokens(b"12345")


def test_hashes_are_the_same_on_every_machine() -> None:
    """Workers and routers of other builds must agree: these values never change."""
    parent = seed("model", "tenant", "adapter")
    hashes = chain(pack_tokens(range(2 * UNIT)), parent)
    assert parent.hex() == "ddde8e478b7dbfee4e9df1db6411a727"
    assert [hash.hex() for hash in hashes] == [
        "afa8f8be4adfe051c6249786e288bfd8",
        "be42b9d4add7b2ed896521c37462e00f",
    ]


@settings(deadline=None, derandomize=True)
@given(first=TOKENS, second=TOKENS, parent=PARENTS)
def test_a_chain_is_continued_from_its_last_full_unit(
    first: list[int], second: list[int], parent: BlockHash
) -> None:
    full = len(first) - len(first) % UNIT
    head = chain(pack_tokens(first), parent)
    assert len(head) == full // UNIT
    tail = chain(pack_tokens(first[full:] + second), head[-1] if head else parent)
    assert chain(pack_tokens(first + second), parent) == head + tail


@settings(deadline=None, derandomize=True)
@given(tokens=TOKENS, parent=PARENTS, units=st.integers(1, 4))
def test_a_larger_block_is_named_by_its_last_unit(
    tokens: list[int], parent: BlockHash, units: int
) -> None:
    by_unit = chain(pack_tokens(tokens), parent)
    assert chain(pack_tokens(tokens), parent, units) == by_unit[units - 1 :: units]


@settings(deadline=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 9), min_size=UNIT, max_size=4 * UNIT), data=st.data())
def test_a_hash_names_the_whole_prefix(tokens: list[int], data: st.DataObject) -> None:
    changed = list(tokens)
    position = data.draw(st.integers(0, len(tokens) - 1))
    changed[position] += 1
    parent = seed("model")
    before, after = chain(pack_tokens(tokens), parent), chain(pack_tokens(changed), parent)
    unit = position // UNIT
    assert before[:unit] == after[:unit]
    assert not set(before[unit:]) & set(after)


def test_a_memoryview_hashes_like_its_bytes() -> None:
    data = pack_tokens(range(3 * UNIT + 5))
    parent = seed("model")
    assert chain(memoryview(data), parent) == chain(data, parent)
    assert len(chain(data, parent)) == 3
    assert chain(b"", parent) == []


def test_seeds_separate_models_tenants_and_adapters() -> None:
    parts = [("m",), ("m", "t"), ("m", "", "t"), ("mt",), ("m", "t", "a"), ("m", "ta"), ("", "mt")]
    seeds = [seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(len(value) == HASH_BYTES for value in seeds)
    assert seed("m", "", "") == seed("m")


def test_equal_units_at_other_positions_have_other_hashes() -> None:
    hashes = chain(pack_tokens([7] * (100 * UNIT)), seed("model"))
    assert len(set(hashes)) == 100


def test_a_long_prompt_is_hashed_in_linear_time() -> None:
    """A bar so low that only a blunder (copies of the whole prompt per unit, say) fails it."""
    tokens = random.Random(1).choices(range(100_000), k=128 * 1024)
    started = perf_counter()
    hashes = chain(pack_tokens(tokens), seed("model"))
    assert perf_counter() - started < 1.0
    assert len(hashes) == 8192
