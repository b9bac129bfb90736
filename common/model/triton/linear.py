"""y = x W^T in Triton with one tile shape for every number of rows: the batch-invariant product.

Libraries choose another kernel, and so another order of summation, for other numbers of rows. Here
K is walked in one order by one program per tile, whatever M is. Used by the decoder when it is
asked to be batch-invariant; its cost against the library's product is in `benchmarks.gpu`.
"""

import torch
import triton
import triton.language as tl

from common.model.triton.tuning import Shape

BLOCK_K = 64
_GROUP_M = 8


@triton.jit
def _linear(
    x,
    weight,
    bias,
    out,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
):
    # Programs that run together take tiles near each other, which share what they read.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    group = program // (GROUP_M * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * column_tiles)
    lines = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    left = x + lines.to(tl.int64)[:, None] * DEPTH + steps[None, :]
    right = weight + columns.to(tl.int64)[None, :] * DEPTH + steps[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        deep = k + steps < DEPTH
        a = tl.load(left + k, mask=(lines < rows)[:, None] & deep[None, :], other=0.0)
        b = tl.load(right + k, mask=(columns < COLUMNS)[None, :] & deep[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]
    target = out + lines.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    inside = (lines < rows)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: Shape
) -> torch.Tensor:
    """x: [rows, depth], weight: [columns, depth], bias: [columns], all contiguous."""
    rows, depth = x.shape
    columns = len(weight)
    out = x.new_empty(rows, columns)
    grid = (triton.cdiv(rows, shape.block_m) * triton.cdiv(columns, shape.block_n),)
    _linear[grid](
        x,
        weight,
        x if bias is None else bias,
        out,
        rows,
        COLUMNS=columns,
        DEPTH=depth,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        BLOCK_K=BLOCK_K,
        GROUP_M=_GROUP_M,
        BIAS=bias is not None,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out
