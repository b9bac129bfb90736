"""Paged attention for prefill chunks in Triton: many queries of a row, with its cached prefix.

A program takes a tile of queries of one row and one kv head; the query heads that share the kv
head lie in one tile, so that K and V are read once for all of them. Tiles of KV begin at fixed
positions, and one program walks all of them in order: the result of a token depends neither on the
batch nor on where its chunk was cut. Called by `common.model.triton.decoder` once per layer.
"""

import math

import torch
import triton
import triton.language as tl

from common.model.triton.rope import Pages
from common.model.triton.tile import attend_tile
from common.model.triton.tuning import Shape


@triton.jit
def _prefill(
    queries,
    out,
    pool,
    blocks,
    table_starts,
    row_starts,
    row_tokens,
    row_counts,
    tile_rows,
    tile_firsts,
    layer,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(tile_rows + tile)
    first = tl.load(tile_firsts + tile)
    begin = tl.load(row_starts + row)
    count = tl.load(row_counts + row)
    per_tile: tl.constexpr = BLOCK_M // GROUP
    lines = tl.arange(0, BLOCK_M)
    step = lines // GROUP
    token = first + step
    valid = (step < per_tile) & (token < count)
    positions = tl.where(valid, begin + token, -1)
    low = begin + first
    high = begin + tl.minimum(first + per_tile, count)

    dims = tl.arange(0, BLOCK_D)
    line = (tl.load(row_tokens + row) + token).to(tl.int64) * (KV_HEADS * GROUP)
    offsets = (line + head * GROUP + lines % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(queries + offsets, mask=inside, other=0.0)

    page = (layer * 2 * KV_HEADS + head) * (BLOCK_SIZE * HEAD_DIM)
    keys = pool + page
    values = keys + KV_HEADS * BLOCK_SIZE * HEAD_DIM
    table = blocks + tl.load(table_starts + row)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW > 0:
        start = tl.maximum(low - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    else:
        start = 0
        plain = (low + 1) // BLOCK_N * BLOCK_N
        for n in range(0, plain, BLOCK_N):
            acc, most, total = attend_tile(
                acc, most, total, q, positions, keys, values, table, n, high, scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, BLOCK_STRIDE, False, WINDOW,
            )  # fmt: skip
        start = plain
    for n in range(start, high, BLOCK_N):
        acc, most, total = attend_tile(
            acc, most, total, q, positions, keys, values, table, n, high, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, BLOCK_STRIDE, True, WINDOW,
        )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + offsets, result.to(q.dtype), mask=inside)


def tokens_per_tile(shape: Shape, group: int) -> int:
    """Queries of one row that a program takes. `group`: query heads per kv head."""
    assert group <= shape.block_m, (group, shape)
    return shape.block_m // group


def prefill_attention(
    queries: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    blocks: torch.Tensor,
    table_starts: torch.Tensor,
    row_starts: torch.Tensor,
    row_tokens: torch.Tensor,
    row_counts: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_firsts: torch.Tensor,
    window: int | None,
    shape: Shape,
) -> None:
    """Write the attention of every token that a tile names into `out`.

    queries, out: [tokens, q_heads, head_dim]. All others int32: blocks [any], the block tables one
    after another; per row: where its table begins, position of its first token, index of that
    token in `queries`, number of tokens; per tile: its row, and its first token within the row.
    The KV of all tokens is in the pool already.
    """
    _, num_heads, head_dim = queries.shape
    group = num_heads // pages.num_kv_heads
    _prefill[(len(tile_rows), pages.num_kv_heads)](
        queries,
        out,
        pages.pool,
        blocks,
        table_starts,
        row_starts,
        row_tokens,
        row_counts,
        tile_rows,
        tile_firsts,
        pages.layer,
        head_dim**-0.5 * math.log2(math.e),
        KV_HEADS=pages.num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        BLOCK_SIZE=pages.block_size,
        BLOCK_STRIDE=pages.block_stride,
        WINDOW=window or 0,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
