"""The pool's tensor and its bytes are the same memory."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.kv.layout import KvLayout
from common.kv.pool import KvPool

LAYOUT = KvLayout(num_layers=2, num_kv_heads=3, head_dim=4, block_size=16, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shape_dtype_and_alignment(dtype: str) -> None:
    layout = KvLayout(2, 3, 4, 32, dtype)
    pool = KvPool(layout, 5)
    assert tuple(pool.tensor.shape) == (5, 2, 2, 3, 32, 4)
    assert pool.tensor.dtype is getattr(torch, dtype)
    assert pool.tensor.is_contiguous()
    assert pool.tensor.data_ptr() % 4096 == 0
    assert pool.tensor.stride(0) * pool.tensor.element_size() == pool.block_bytes
    assert len(pool.slab(4)) == pool.block_bytes == layout.block_bytes


def test_a_slab_is_the_memory_of_one_block() -> None:
    pool = KvPool(LAYOUT, 5)
    pool.tensor.zero_()
    pool.tensor[2] = torch.arange(pool.tensor[2].numel(), dtype=torch.float32).view(2, 2, 3, 16, 4)
    slab = pool.slab(2)
    assert not slab.readonly and slab.format == "B" and slab.contiguous
    assert np.array_equal(np.frombuffer(slab, np.float32), np.arange(768, dtype=np.float32))
    assert not any(pool.slab(1)) and not any(pool.slab(3))
    slab[:4] = np.float32(-7).tobytes()
    assert pool.tensor[2, 0, 0, 0, 0, 0].item() == -7


def test_a_run_covers_consecutive_blocks() -> None:
    pool = KvPool(LAYOUT, 5)
    for block in range(5):
        pool.tensor[block] = block
    run = pool.run(1, 3)
    values = np.frombuffer(run, np.float32).reshape(3, -1)
    assert [set(row) for row in values] == [{1.0}, {2.0}, {3.0}]
    assert bytes(pool.run(0, 5)[2 * pool.block_bytes : 3 * pool.block_bytes]) == bytes(pool.slab(2))


@pytest.mark.parametrize(("block", "count"), [(-1, 1), (5, 1), (4, 2), (0, 6), (0, 0), (2, -1)])
def test_a_run_outside_the_pool(block: int, count: int) -> None:
    with pytest.raises(AssertionError, match=f"{block}, {count}, 5"):
        KvPool(LAYOUT, 5).run(block, count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_poison_is_nan_everywhere(dtype: str) -> None:
    pool = KvPool(KvLayout(2, 3, 4, 16, dtype), 3, poison=True)
    assert bool(torch.isnan(pool.tensor).all())
    assert bool(torch.isnan(torch.frombuffer(pool.slab(2), dtype=pool.tensor.dtype)).all())


def test_offsets_beyond_32_bits() -> None:
    """Only the touched pages of this pool of 4 GiB take memory."""
    layout = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    num_blocks = (1 << 32) // layout.block_bytes + 2
    pool = KvPool(layout, num_blocks)
    last = num_blocks - 1
    assert last * layout.block_bytes > 1 << 32
    assert last * pool.tensor.stride(0) > 1 << 31
    pool.tensor[last, 0, 0, 0, 0, :2] = torch.tensor([1.5, 2.5])
    assert bytes(pool.slab(last)[:4]) == bytes.fromhex("c03f2040")


def test_more_memory_than_there_is() -> None:
    for num_blocks in (1 << 45, 1 << 60):
        with pytest.raises(ConfigError, match=r"^cannot allocate [\d,]+ bytes of KV cache on cpu$"):
            KvPool(LAYOUT, num_blocks)


def test_no_blocks() -> None:
    with pytest.raises(AssertionError, match="0"):
        KvPool(LAYOUT, 0)
