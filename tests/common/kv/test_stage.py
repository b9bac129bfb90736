"""Slots before a pool, and copies to and fro; a pool on CPU stands for one on a GPU."""

import pytest
import torch

from common.errors import ConfigError
from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.kv.stage import MIN_SLOTS, KvStage, runs
from kvtransfer.memory import StagedMemory

LAYOUT = KvLayout(2, 3, 4, 16, "bfloat16")


@pytest.fixture
def pool() -> KvPool:
    pool = KvPool(LAYOUT, 5)
    pool.tensor.copy_(torch.randn(pool.tensor.shape).bfloat16())
    return pool


def test_blocks_go_to_slots_and_back(pool: KvPool) -> None:
    stage = KvStage(pool, 40 * pool.block_bytes)
    assert isinstance(stage, StagedMemory) and stage.num_slots == 40
    before = pool.tensor.clone()
    copied = stage.fetch([(1, 7), (2, 8), (0, 30)])
    copied.synchronize()
    assert copied.query()
    for block, slot in ((1, 7), (2, 8), (0, 30)):
        assert stage.slab(slot) == pool.slab(block)
    assert stage.run(7, 2) == pool.run(1, 2)
    stage.store([(30, 4), (7, 3)]).synchronize()
    assert torch.equal(pool.tensor[[4, 3]], before[[0, 1]])
    assert torch.equal(pool.tensor[:3], before[:3])


def test_there_are_some_slots_at_least(pool: KvPool) -> None:
    stage = KvStage(pool, 1)
    assert stage.num_slots == MIN_SLOTS == stage.shared.num_blocks
    assert stage.block_bytes == pool.block_bytes


def test_no_such_memory(pool: KvPool) -> None:
    with pytest.raises(ConfigError, match="no host memory for --stage-memory"):
        KvStage(pool, 1 << 62)


def test_neighbours_are_one_copy() -> None:
    assert list(runs([])) == []
    assert list(runs([(3, 1), (4, 2), (5, 4), (6, 5), (1, 6)])) == [(3, 1, 2), (5, 4, 2), (1, 6, 1)]
