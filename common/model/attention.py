"""Paged attention in plain torch: the reference for every kernel, on any device.

Called by `common.model.llama` once per layer. Reads and writes the pool
`[num_blocks, layer, k|v, kv_head, slot, head_dim]` through two flat views: a *page* is all slots
of one head (`slot * head_dim` values, contiguous), a *slot* is one head of one token.

Slots that hold no token are never read into a result, whatever they contain: they are cut off or
zeroed after the gather (a mask on the scores alone would let `0 * NaN` through V).
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from common.model.attention_plan import AttentionPlan, Bucket, Chunk, Window


class LayerPool:
    """One layer's part of the KV pool, seen as pages and as slots."""

    def __init__(self, pool: torch.Tensor, layer: int) -> None:
        _, _, kinds, heads, slots, head_dim = pool.shape
        assert pool.is_contiguous() and kinds == 2, (pool.shape, pool.stride())
        offset = layer * kinds * heads
        # A view that starts at this layer: indices of layer 0 then address it.
        self.pages = pool.view(-1, slots * head_dim)[offset:]
        self.slots = pool.view(-1, head_dim)[offset * slots :]
        self.num_kv_heads = heads
        self.head_dim = head_dim


def attend(
    heads: torch.Tensor, pool: LayerPool, plan: AttentionPlan, window: Window
) -> torch.Tensor:
    """Write the new K and V into the pool, then let every token attend to its context.

    heads: [tokens, q_heads + 2 * kv_heads, head_dim], q, k and v of the step, rotated.
    Returns [tokens, q_heads * head_dim].
    """
    num_tokens, total, head_dim = heads.shape
    num_queries = total - 2 * pool.num_kv_heads
    pool.slots.index_copy_(0, plan.store, heads[:, num_queries:].reshape(-1, head_dim))
    queries = heads[:, :num_queries]
    if len(plan.buckets) == 1 and not plan.chunks:
        # Plain decode: one bucket holds all tokens in their order.
        return _attend_bucket(queries, pool, plan.buckets[0], window).view(num_tokens, -1)
    result = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for bucket in plan.buckets:
        attended = _attend_bucket(queries[bucket.tokens], pool, bucket, window)
        result.index_copy_(0, bucket.tokens, attended)
    for chunk in plan.chunks:
        _attend_chunk(heads[chunk.first : chunk.last], pool, chunk, window, result)
    return result.view(num_tokens, -1)


def _attend_bucket(
    queries: torch.Tensor, pool: LayerPool, bucket: Bucket, window: Window
) -> torch.Tensor:
    """queries and result: [rows, q_heads, head_dim]."""
    rows, num_queries, head_dim = queries.shape
    gathered = pool.pages.index_select(0, bucket.pages)
    if bucket.stale is not None:
        gathered.view(-1, head_dim).index_fill_(0, bucket.stale, 0)
    keys, values = gathered.view(2, rows, pool.num_kv_heads, -1, head_dim)[
        :, :, :, : bucket.context
    ]
    # The queries that share a kv head stand in for a sequence: nothing is repeated for GQA.
    grouped = queries.reshape(rows, pool.num_kv_heads, -1, head_dim)
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=bucket.masks[window])
    return attended.reshape(rows, num_queries, head_dim)


def _attend_chunk(
    heads: torch.Tensor, pool: LayerPool, chunk: Chunk, window: Window, result: torch.Tensor
) -> None:
    """heads: [chunk tokens, all heads, head_dim]; writes the chunk's part of `result`."""
    num_queries = heads.shape[1] - 2 * pool.num_kv_heads
    if chunk.pages is None:
        keys, values = heads[:, num_queries:].transpose(0, 1).chunk(2)
    else:
        gathered = pool.pages.index_select(0, chunk.pages)
        keys, values = gathered.view(2, pool.num_kv_heads, -1, pool.head_dim)
    for tile in chunk.tiles:
        mask = tile.masks[window]
        attended = scaled_dot_product_attention(
            heads[tile.first : tile.last, :num_queries].transpose(0, 1)[None],
            keys[None, :, : tile.context],
            values[None, :, : tile.context],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        start = chunk.first + tile.first
        result[start : start + tile.last - tile.first] = attended[0].transpose(0, 1)
