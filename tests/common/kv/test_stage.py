"""Slots before a pool, and copies to and fro; a pool on CPU stands for one on a GPU."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from common.errors import ConfigError
from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.kv.stage import MIN_SLOTS, KvStage, _pin, runs
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


def test_copies_on_a_cpu_wait_for_no_other_thread() -> None:
    pool = KvPool(KvLayout(4, 4, 64, 16, "float32"), 6)  # blocks of 128 KiB
    stage = KvStage(pool, 1)

    def num_started() -> int:
        before = len(os.listdir("/proc/self/task"))
        stage.fetch([(0, 0), (1, 1), (2, 2)])
        stage.store([(0, 3), (1, 4), (2, 5)])
        return len(os.listdir("/proc/self/task")) - before

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(1) as io:
            assert io.submit(num_started).result() == 0
    finally:
        torch.set_num_threads(threads)


def test_memory_that_cannot_be_pinned_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next kernel is told of the error, and nobody asks for it."""
    pending = [801]

    def register(address: int, size: int, flags: int) -> int:
        return pending[0]

    def ones(size: int, device: torch.device) -> None:
        raise RuntimeError(f"CUDA error {pending.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "ones", ones)
    with caplog.at_level(logging.WARNING, "tandem.worker"):
        _pin(torch.zeros(8, dtype=torch.uint8), torch.device("cpu"))
    assert "cannot be pinned (CUDA error 801)" in caplog.text and not pending


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
