"""Paged attention for decode rows in Triton: one query token per row, split over the context.

The context is cut at multiples of `SPLIT` tokens. Each part leaves an accumulator, a maximum and a
sum in a workspace, and a second kernel adds the parts up in their order. Where the cuts are depends
on nothing but the position, and the number of programs that share the parts changes no result: a
row's bits are the same in every batch. Called by `common.model.triton.decoder` once per layer.
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl

from common.model.triton.rope import Pages
from common.model.triton.tile import attend_tile
from common.model.triton.tuning import Shape

SPLIT: Final = 256
"""Tokens of a part of the context; part of the result, so the same everywhere."""
PARTS: Final = 16
"""Parts that the second kernel reads at once; part of the result, too."""
_LEAST_GROUP: Final = 16
"""Lines of the smallest matrix product."""


@triton.jit
def _decode(
    queries,
    partials,
    sums,
    pool,
    blocks,
    table_starts,
    lengths,
    part_starts,
    layer,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    parts = tl.cdiv(length, SPLIT)
    low = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    heads = head * GROUP + group
    inside = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + heads
    offsets = line[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(queries + offsets, mask=inside, other=0.0)
    positions = tl.where(group < GROUP, length - 1, -1)
    page = (layer * 2 * KV_HEADS + head) * (BLOCK_SIZE * HEAD_DIM)
    keys = pool + page
    values = keys + KV_HEADS * BLOCK_SIZE * HEAD_DIM
    table = blocks + tl.load(table_starts + row)
    slot = tl.load(part_starts + row)
    for part in range(low // SPLIT + tl.program_id(2), parts, tl.num_programs(2)):
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        most = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        start = tl.maximum(part * SPLIT, low // BLOCK_N * BLOCK_N)
        end = tl.minimum(part * SPLIT + SPLIT, length)
        for n in range(start, end, BLOCK_N):
            acc, most, total = attend_tile(
                acc, most, total, q, positions, keys, values, table, n, end, scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, BLOCK_STRIDE, True, WINDOW,
            )  # fmt: skip
        target = (slot + part).to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(partials + target[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(sums + target * 2, most, mask=group < GROUP)
        tl.store(sums + target * 2 + 1, total, mask=group < GROUP)


@triton.jit
def _combine(
    out,
    partials,
    sums,
    lengths,
    part_starts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    parts = tl.cdiv(length, SPLIT)
    first = tl.maximum(length - WINDOW, 0) // SPLIT if WINDOW > 0 else 0
    slot = tl.load(part_starts + row)
    dims = tl.arange(0, BLOCK_D)
    steps = tl.arange(0, PARTS)
    acc = tl.zeros([BLOCK_D], tl.float32)
    most = float("-inf")
    total = 0.0
    for begin in range(first, parts, PARTS):
        inside = begin + steps < parts
        source = (slot + begin + steps).to(tl.int64) * HEADS + head
        highs = tl.load(sums + source * 2, mask=inside, other=float("-inf"))
        weights = tl.load(sums + source * 2 + 1, mask=inside, other=0.0)
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        tiles = tl.load(partials + source[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        higher = tl.maximum(most, tl.max(highs, 0))
        fade = tl.exp2(most - higher)
        fades = tl.exp2(highs - higher)
        total = total * fade + tl.sum(weights * fades, 0)
        acc = acc * fade + tl.sum(tiles * fades[:, None], 0)
        most = higher
    result = acc / tl.where(total > 0, total, 1.0)
    target = out + (row.to(tl.int64) * HEADS + head) * HEAD_DIM + dims
    tl.store(target, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


class Workspace:
    """Where the parts of one step leave their results; the layers use it one after another."""

    def __init__(self, parts: int, num_heads: int, head_dim: int, device: torch.device) -> None:
        self.parts = parts
        self.partials = torch.empty(parts, num_heads, head_dim, device=device)
        self.sums = torch.empty(parts, num_heads, 2, device=device)


def num_parts(length: int) -> int:
    """Parts of the workspace that a row with this context takes."""
    return -(-length // SPLIT)


def decode_attention(
    queries: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    blocks: torch.Tensor,
    table_starts: torch.Tensor,
    lengths: torch.Tensor,
    part_starts: torch.Tensor,
    workspace: Workspace,
    window: int | None,
    shape: Shape,
    lanes: int,
) -> None:
    """Write the attention of `len(lengths)` rows, one token each, into `out`.

    queries, out: [rows or more, q_heads, head_dim]. All others int32: blocks [any], the block
    tables one after another; per row: where its table begins, its context (the token itself
    included; 0: an empty row, whose result is 0), and its first part in the workspace. lanes:
    programs that share the parts of one row and head.
    """
    _, num_heads, head_dim = queries.shape
    rows = len(lengths)
    group = num_heads // pages.num_kv_heads
    block_d = triton.next_power_of_2(head_dim)
    _decode[(rows, pages.num_kv_heads, lanes)](
        queries,
        workspace.partials,
        workspace.sums,
        pages.pool,
        blocks,
        table_starts,
        lengths,
        part_starts,
        pages.layer,
        head_dim**-0.5 * math.log2(math.e),
        KV_HEADS=pages.num_kv_heads,
        GROUP=group,
        BLOCK_G=max(_LEAST_GROUP, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_N=shape.block_n,
        BLOCK_SIZE=pages.block_size,
        BLOCK_STRIDE=pages.block_stride,
        WINDOW=window or 0,
        SPLIT=SPLIT,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    _combine[(rows, num_heads)](
        out,
        workspace.partials,
        workspace.sums,
        lengths,
        part_starts,
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        WINDOW=window or 0,
        SPLIT=SPLIT,
        PARTS=PARTS,
        num_warps=4,
    )
