"""The paged reference against attention written out in float64 over dense K and V."""

from dataclasses import dataclass
from random import Random

import pytest
import torch

from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.attention import LayerPool, attend
from common.model.attention_plan import TILE_TOKENS, Planner, Window
from common.model.batch import Row

HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 8, 3
CPU = torch.device("cpu")


@dataclass
class Case:
    """Rows over a poisoned pool, and the same K and V as dense tensors."""

    rows: list[Row]
    heads: torch.Tensor
    """[tokens, HEADS + 2 * KV_HEADS, DIM] of the step."""
    keys: list[torch.Tensor]
    """Per row [context, KV_HEADS, DIM]."""
    values: list[torch.Tensor]
    pool: KvPool


def make_case(shapes: list[tuple[int, int]], block_size: int, layer: int) -> Case:
    """shapes: (start, count) per row. Every slot that holds no token is NaN."""
    generator = torch.Generator().manual_seed(len(shapes))
    layout = KvLayout(LAYERS, KV_HEADS, DIM, block_size, "float32")
    tables = [layout.blocks_for(start + count) for start, count in shapes]
    pool = KvPool(layout, sum(tables) + 1, poison=True)
    free = list(range(pool.num_blocks))
    Random(0).shuffle(free)
    case = Case([], torch.empty(0, HEADS + 2 * KV_HEADS, DIM), [], [], pool)
    for (start, count), num_blocks in zip(shapes, tables, strict=True):
        blocks = [free.pop() for _ in range(num_blocks)]
        case.rows.append(Row([0] * count, start, blocks))
        new = torch.randn(count, HEADS + 2 * KV_HEADS, DIM, generator=generator)
        old = torch.randn(2, start, KV_HEADS, DIM, generator=generator)
        for position in range(start):
            block, slot = blocks[position // block_size], position % block_size
            pool.tensor[block, layer, :, :, slot] = old[:, position]
        case.heads = torch.cat((case.heads, new))
        case.keys.append(torch.cat((old[0], new[:, HEADS : HEADS + KV_HEADS])))
        case.values.append(torch.cat((old[1], new[:, HEADS + KV_HEADS :])))
    return case


def dense(case: Case, window: Window) -> torch.Tensor:
    results = []
    queries = iter(case.heads[:, :HEADS].double())
    for row, keys, values in zip(case.rows, case.keys, case.values, strict=True):
        for i in range(len(row.tokens)):
            one = next(queries)
            end = row.start + i + 1
            begin = 0 if window is None else max(0, end - window)
            k = keys[begin:end].double().repeat_interleave(HEADS // KV_HEADS, 1)
            v = values[begin:end].double().repeat_interleave(HEADS // KV_HEADS, 1)
            scores = torch.einsum("hd,chd->hc", one, k) * DIM**-0.5
            results.append(torch.einsum("hc,chd->hd", scores.softmax(-1), v).reshape(-1))
    return torch.stack(results).float()


def run(case: Case, layer: int, window: Window, max_bucket_bytes: int = 64 << 20) -> torch.Tensor:
    planner = Planner(
        case.pool.layout,
        (None, window),
        torch.float32,
        CPU,
        max_bucket_bytes=max_bucket_bytes,
    )
    return attend(case.heads, LayerPool(case.pool.tensor, layer), planner.plan(case.rows), window)


DECODE = [(0, 1), (14, 1), (15, 1), (16, 1), (31, 1), (32, 1), (100, 1), (301, 1), (15, 1)]
PREFILL = [(0, 2), (0, 16), (0, 33), (16, 5), (17, 16), (31, 3), (90, 40)]
CASES = {
    "one token": [(0, 1)],
    "one row of decode": [(37, 1)],
    "equal contexts": [(40, 1)] * 4,
    "full blocks": [(31, 1), (15, 1), (31, 1)],
    "decode": DECODE,
    "prefill": PREFILL,
    "mixed": [*DECODE[::2], *PREFILL[::2], *DECODE[1::2], *PREFILL[1::2]],
}


@pytest.mark.parametrize("window", [None, 1, 10, 16, 1_000])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, block_size: int, window: Window) -> None:
    case = make_case(CASES[name], block_size, layer=1)
    result = run(case, 1, window)
    torch.testing.assert_close(result, dense(case, window), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, TILE_TOKENS - 100])
def test_many_tiles(window: Window) -> None:
    case = make_case([(0, TILE_TOKENS + 20), (50, TILE_TOKENS + 1)], 16, layer=0)
    result = run(case, 0, window)
    torch.testing.assert_close(result, dense(case, window), rtol=1e-5, atol=1e-6)


def test_small_buckets_change_nothing() -> None:
    shapes = [(n, 1) for n in (3, 50, 20, 33, 47, 64, 21)]
    whole = run(make_case(shapes, 16, layer=2), 2, None)
    split = run(make_case(shapes, 16, layer=2), 2, None, max_bucket_bytes=1)
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-6)


def test_buckets_bound_padding_and_memory() -> None:
    layout = KvLayout(LAYERS, KV_HEADS, DIM, 16, "float32")
    block_bytes = layout.block_bytes // LAYERS
    planner = Planner(layout, (None,), torch.float32, CPU, max_bucket_bytes=24 * block_bytes)
    starts = [0, 16 * 9, 16 * 3, 15, 16 * 7, 16 * 5, 31, 16 * 40, 16 * 4, 16]
    rows = [Row([0], start, list(range(start // 16 + 1))) for start in starts]
    buckets = [
        (bucket.tokens.tolist(), len(bucket.pages) // (2 * KV_HEADS * len(bucket.tokens)))
        for bucket in planner.plan(rows).buckets
    ]
    # (rows, blocks gathered for each). Two rows of 10 fit into 24 blocks, a third of 6 does not;
    # 10 is at most half of 41, 2 of 6 and 1 of 2.
    assert buckets == [([7], 41), ([1, 4], 10), ([2, 5, 8], 6), ([6, 9], 2), ([0, 3], 1)]


def test_stores_what_it_is_given_and_nothing_else() -> None:
    case = make_case(CASES["mixed"], 16, layer=1)
    before = case.pool.tensor.clone()
    run(case, 1, None)
    for row, keys, values in zip(case.rows, case.keys, case.values, strict=True):
        for position in range(row.start, row.start + len(row.tokens)):
            block, slot = row.blocks[position // 16], position % 16
            stored = case.pool.tensor[block, 1, :, :, slot]
            assert torch.equal(stored, torch.stack((keys[position], values[position])))
            before[block, 1, :, :, slot] = stored
    torch.testing.assert_close(case.pool.tensor, before, rtol=0, atol=0, equal_nan=True)
