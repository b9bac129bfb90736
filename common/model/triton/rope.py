"""Triton kernel between the projection to q, k and v and attention.

In one pass over the projection: the norms of q and k where the model has them, rotation of q and
k, and the store of k and v into the pool. Called by `common.model.triton.decoder` once per layer;
the reference is `common.model.llama` with `common.model.rope`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Pages(NamedTuple):
    """One layer of a pool `[num_blocks, layer, k|v, kv_head, slot, head_dim]`, for the kernels."""

    pool: torch.Tensor
    layer: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    block_stride: int
    """Elements from a block to the next one."""

    @staticmethod
    def of(pool: torch.Tensor, layer: int) -> "Pages":
        _, _, kinds, heads, slots, head_dim = pool.shape
        assert pool.is_contiguous() and kinds == 2, (pool.shape, pool.stride())
        return Pages(pool, layer, heads, slots, head_dim, pool.stride(0))


@triton.jit
def _rope_store(
    qkv,
    q_out,
    pool,
    slots,
    positions,
    cos_table,
    sin_table,
    q_norm,
    k_norm,
    layer,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_HALF)
    total: tl.constexpr = HEADS + 2 * KV_HEADS
    half = columns < HALF
    inside = (heads < total)[:, None] & half[None, :]
    source = qkv + token * (total * HEAD_DIM) + heads[:, None] * HEAD_DIM + columns[None, :]
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = first.dtype
    x, y = first.to(tl.float32), second.to(tl.float32)
    is_query = heads < HEADS
    is_value = heads >= HEADS + KV_HEADS
    if NORM:
        squares = tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)
        scale = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
        q_x = tl.load(q_norm + columns, mask=half, other=0.0).to(tl.float32)
        q_y = tl.load(q_norm + HALF + columns, mask=half, other=0.0).to(tl.float32)
        k_x = tl.load(k_norm + columns, mask=half, other=0.0).to(tl.float32)
        k_y = tl.load(k_norm + HALF + columns, mask=half, other=0.0).to(tl.float32)
        w_x = tl.where(is_query[:, None], q_x[None, :], k_x[None, :])
        w_y = tl.where(is_query[:, None], q_y[None, :], k_y[None, :])
        normed_x = ((x * scale).to(dtype).to(tl.float32) * w_x).to(dtype).to(tl.float32)
        normed_y = ((y * scale).to(dtype).to(tl.float32) * w_y).to(dtype).to(tl.float32)
        x = tl.where(is_value[:, None], x, normed_x)
        y = tl.where(is_value[:, None], y, normed_y)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(cos_table + position * HALF + columns, mask=half, other=1.0).to(tl.float32)
    sin = tl.load(sin_table + position * HALF + columns, mask=half, other=0.0).to(tl.float32)
    rotated_x = x * cos[None, :] - y * sin[None, :]
    rotated_y = y * cos[None, :] + x * sin[None, :]
    x = tl.where(is_value[:, None], x, rotated_x).to(dtype)
    y = tl.where(is_value[:, None], y, rotated_y).to(dtype)

    target = q_out + token * (HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + columns[None, :]
    tl.store(target, x, mask=inside & is_query[:, None])
    tl.store(target + HALF, y, mask=inside & is_query[:, None])
    slot = tl.load(slots + token)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    # k heads, then v heads: the pages of a layer lie in the order of the projection.
    page = layer * (2 * KV_HEADS) + heads - HEADS
    stored = pool + block * BLOCK_STRIDE + page[:, None] * (BLOCK_SIZE * HEAD_DIM)
    stored += (slot % BLOCK_SIZE) * HEAD_DIM + columns[None, :]
    keep = inside & (heads >= tl.where(slot >= 0, HEADS, total))[:, None]
    tl.store(stored, x, mask=keep)
    tl.store(stored + HALF, y, mask=keep)


def rope_store(
    qkv: torch.Tensor,
    pages: Pages,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Returns the rotated queries [tokens, q_heads, head_dim].

    qkv: [tokens, (q_heads + 2 * kv_heads) * head_dim], contiguous. slots: [tokens] int32, block *
    block_size + slot of each token; negative: store nothing. positions: [tokens] int32. tables:
    cos and sin, [positions, head_dim / 2]. norms: weights of q and k, [head_dim] each.
    """
    tokens, width = qkv.shape
    head_dim = pages.head_dim
    total = width // head_dim
    num_heads = total - 2 * pages.num_kv_heads
    out = qkv.new_empty(tokens, num_heads, head_dim)
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = max(1, min(triton.next_power_of_2(total), 2048 // block_half))
    _rope_store[(tokens, triton.cdiv(total, block_heads))](
        qkv,
        out,
        pages.pool,
        slots,
        positions,
        *tables,
        q_norm,
        k_norm,
        pages.layer,
        eps,
        HEADS=num_heads,
        KV_HEADS=pages.num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=head_dim // 2,
        BLOCK_HALF=block_half,
        BLOCK_HEADS=block_heads,
        BLOCK_SIZE=pages.block_size,
        BLOCK_STRIDE=pages.block_stride,
        NORM=norms is not None,
        num_warps=4,
    )
    return out
