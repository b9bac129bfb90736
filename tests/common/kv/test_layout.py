"""Sizes of a block, and layouts that cannot be."""

import pytest

from common.errors import ConfigError
from common.kv.layout import KvLayout
from common.messages import KvLayoutInfo


def test_sizes_of_a_block() -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=32, dtype="bfloat16")
    assert layout.block_shape == (3, 2, 2, 32, 8)
    assert layout.block_bytes == 3 * 2 * 2 * 32 * 8 * 2
    assert layout.units_per_block == 2


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_follow_the_dtype(dtype: str, width: int) -> None:
    assert KvLayout(1, 1, 4, 16, dtype).block_bytes == 2 * 16 * 4 * width


@pytest.mark.parametrize(
    ("num_tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert KvLayout(1, 1, 4, 16, "float32").blocks_for(num_tokens) == blocks


def test_what_peers_are_told() -> None:
    assert KvLayout(3, 2, 8, 32, "float16").info() == KvLayoutInfo(
        block_size=32,
        num_layers=3,
        num_kv_heads=2,
        head_dim=8,
        dtype="float16",
        order="block,layer,kv,head,slot,dim",
    )


@pytest.mark.parametrize("block_size", [-16, 0, 1, 8, 15, 17, 40])
def test_block_sizes_are_multiples_of_the_hash_unit(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"^block size {block_size} is not a multiple of 16$"):
        KvLayout(1, 1, 4, block_size, "float32")


def test_unknown_dtype() -> None:
    with pytest.raises(
        ConfigError, match=r"^KV dtype 'int8' is not one of float32, bfloat16, float16$"
    ):
        KvLayout(1, 1, 4, 16, "int8")
