"""One tile of paged attention in Triton: what the kernels for prefill and for decode share.

Online softmax after Milakov and Gimelshein ("Online normalizer calculation for softmax", 2018), in
base 2, as in FlashAttention-2 (Dao 2023). A tile that is hidden altogether changes no bit, so the
result of a query does not depend on the tiles that other queries of its program need.
"""

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    acc,
    most,
    total,
    q,
    positions,
    keys,
    values,
    table,
    start,
    end,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Take tokens `start .. start + BLOCK_N` of one sequence into the running softmax.

    acc: [M, BLOCK_D] float32; most, total: [M] float32, the running maximum and sum. q: [M,
    BLOCK_D]. positions: [M], of each query, -1 for none. keys, values: pointers to slot 0 of block
    0 of this layer and head. table: pointer to the block table. scale: of the scores, with log2(e)
    in it. Tokens from `end` on are never read. MASKED: some query may not see all of the tile.
    """
    steps = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    tokens = start + steps
    if BLOCK_SIZE % BLOCK_N == 0:
        # The tile lies in one block: one look into the table, one contiguous read.
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64) * BLOCK_STRIDE
        keys += block
        values += block
        offsets = (start % BLOCK_SIZE + steps)[:, None] * HEAD_DIM + dims[None, :]
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0).to(tl.int64)
        offsets = (blocks * BLOCK_STRIDE + (tokens % BLOCK_SIZE) * HEAD_DIM)[:, None] + dims[
            None, :
        ]
    if MASKED:
        # Slots past the end may hold NaN, which no mask on the scores would keep out of V.
        inside = (tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0)
        v = tl.load(values + offsets, mask=inside, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        inside = (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0)
        v = tl.load(values + offsets, mask=inside, other=0.0)
    else:
        k = tl.load(keys + offsets)
        v = tl.load(values + offsets)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = tokens[None, :] <= positions[:, None]
        if WINDOW > 0:
            visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1) * scale)
    # A query that has seen nothing yet: -inf - -inf would be NaN.
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - safe[:, None])
    fade = tl.exp2(most - safe)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, higher, total
