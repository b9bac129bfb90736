"""Paged attention by the kernels against attention written out in float64 over dense K and V."""

from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
import torch

from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.triton.decode import SPLIT, Workspace, decode_attention
from common.model.triton.inputs import Step, pack
from common.model.triton.prefill import prefill_attention, tokens_per_tile
from common.model.triton.rope import Pages
from common.model.triton.tuning import Shape

LAYERS, LAYER = 2, 1
SHAPE = Shape(block_m=32, block_n=16, num_warps=4, num_stages=1)
WIDE = Shape(block_m=16, block_n=64, num_warps=4, num_stages=1)
TOLERANCES = {"float32": 1e-5, "float16": 2e-3}


@dataclass
class Case:
    """Rows over a pool in which every slot that holds no token is NaN."""

    rows: list[Row]
    queries: torch.Tensor
    expected: torch.Tensor
    """[tokens, heads, head_dim] each."""
    pool: KvPool


def make_case(
    shapes: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    block_size: int = 16,
    dtype: str = "float32",
) -> Case:
    """shapes: (start, count) per row; the KV of all tokens is in the pool."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)) + head_dim)
    layout = KvLayout(LAYERS, kv_heads, head_dim, block_size, dtype)
    tables = [layout.blocks_for(start + count) for start, count in shapes]
    pool = KvPool(layout, sum(tables) + 1, poison=True)
    free = list(range(pool.num_blocks))
    Random(0).shuffle(free)
    rows: list[Row] = []
    queries, results = [], []
    for (start, count), num_blocks in zip(shapes, tables, strict=True):
        blocks = [free.pop() for _ in range(num_blocks)]
        rows.append(Row([0] * count, start, blocks))
        kv = torch.randn(start + count, 2, kv_heads, head_dim, generator=generator)
        kv = kv.to(pool.tensor.dtype)
        for position, one in enumerate(kv):
            pool.tensor[blocks[position // block_size], LAYER, :, :, position % block_size] = one
        q = torch.randn(count, heads, head_dim, generator=generator).to(kv.dtype)
        queries.append(q)
        results.append(dense(q.double(), kv.double(), start, window))
    return Case(rows, torch.cat(queries), torch.cat(results), pool)


def dense(queries: torch.Tensor, kv: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
    count, heads, head_dim = queries.shape
    keys, values = kv.repeat_interleave(heads // kv.shape[2], dim=2).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * head_dim**-0.5
    at = torch.arange(start, start + count)[:, None]
    seen = torch.arange(len(kv))[None, :]
    hidden = seen > at
    if window is not None:
        hidden |= seen <= at - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def step_of(case: Case, invariant: bool, per_tile: int) -> Step:
    packed = pack(case.rows, [], case.pool.layout.block_size, per_tile, invariant=invariant)
    return Step.of(torch.from_numpy(packed.numbers), packed)


def prefill(case: Case, window: int | None, shape: Shape = SHAPE) -> torch.Tensor:
    group = case.queries.shape[1] // case.pool.layout.num_kv_heads
    step = step_of(case, True, tokens_per_tile(shape, group))
    out = torch.full_like(case.queries, float("nan"))
    prefill_attention(
        case.queries,
        out,
        Pages.of(case.pool.tensor, LAYER),
        step.blocks,
        step.table_starts,
        step.row_starts,
        step.row_tokens,
        step.row_counts,
        step.tile_rows,
        step.tile_firsts,
        window,
        shape,
    )
    return out


def decode(case: Case, window: int | None, shape: Shape = SHAPE, lanes: int = 2) -> torch.Tensor:
    step = step_of(case, False, 1)
    heads, head_dim = case.queries.shape[1:]
    parts = Workspace(step.num_parts, heads, head_dim, torch.device("cpu"))
    parts.partials.fill_(float("nan"))
    parts.sums.fill_(float("nan"))
    out = torch.full_like(case.queries, float("nan"))
    decode_attention(
        case.queries,
        out,
        Pages.of(case.pool.tensor, LAYER),
        step.blocks,
        step.decode_tables,
        step.lengths,
        step.part_starts,
        parts,
        window,
        shape,
        lanes,
    )
    return out


def check(result: torch.Tensor, case: Case) -> None:
    tolerance = TOLERANCES[case.pool.layout.dtype]
    torch.testing.assert_close(result.double(), case.expected, atol=tolerance, rtol=tolerance)


RAGGED = [(0, 1), (0, 15), (0, 16), (0, 17), (31, 33), (16, 1), (40, 5)]
"""(prefix, tokens): one token, block edges, ragged tails, empty prefixes, chunks with a prefix."""


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_prefill(group: int, head_dim: int, window: int | None) -> None:
    case = make_case(RAGGED[group % 3 :: 3], group, 1, head_dim, window)
    check(prefill(case, window), case)


@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_prefill_of_a_ragged_batch(window: int | None, dtype: str) -> None:
    case = make_case(RAGGED, 6, 2, 16, window, block_size=32, dtype=dtype)
    check(prefill(case, window), case)


@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("block_size", [16, 48])
def test_prefill_tiles_and_blocks_of_other_sizes(block_n: int, block_size: int) -> None:
    """A tile may be smaller than a block, a block, or span blocks."""
    case = make_case([(70, 30), (0, 3)], 3, 1, 16, None, block_size=block_size)
    check(prefill(case, None, Shape(16, block_n, 4, 1)), case)


@pytest.mark.parametrize("window", [None, 20])
def test_prefill_does_not_depend_on_cuts(window: int | None) -> None:
    """The bits of a token are the same whether its chunk is one token or all."""
    case = make_case([(0, 75)], 4, 2, 16, window)
    whole = prefill(case, window)
    table = case.rows[0].blocks
    for start, end in [(0, 1), (33, 50), (74, 75), (16, 75)]:
        part = Case([Row([0] * (end - start), start, table)], case.queries[start:end],
                    case.expected, case.pool)  # fmt: skip
        assert torch.equal(prefill(part, window), whole[start:end]), (start, end)


CONTEXTS = [1, 15, 16, 17, SPLIT - 1, SPLIT, SPLIT + 1, 40]


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_decode(group: int, head_dim: int, window: int | None) -> None:
    contexts = CONTEXTS[group % 3 :: 3]
    case = make_case([(context - 1, 1) for context in contexts], group, 1, head_dim, window)
    check(decode(case, window, SHAPE if window else WIDE), case)


@pytest.mark.parametrize("window", [None, 1, SPLIT, SPLIT + 20])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_decode_of_a_ragged_batch(window: int | None, dtype: str) -> None:
    contexts = [1, 2 * SPLIT + 5, 17, SPLIT]
    case = make_case([(n - 1, 1) for n in contexts], 6, 2, 16, window, 32, dtype)
    check(decode(case, window), case)


def test_decode_over_many_parts() -> None:
    """More parts than the second kernel reads at once."""
    case = make_case([(17 * SPLIT + 3, 1), (2, 1)], 2, 1, 8, None)
    check(decode(case, None, WIDE, lanes=5), case)


@pytest.mark.parametrize("window", [None, 300])
def test_decode_does_not_depend_on_company_or_lanes(window: int | None) -> None:
    case = make_case([(n - 1, 1) for n in (2 * SPLIT + 9, 1, 300)], 4, 1, 16, window)
    together = decode(case, window, WIDE)
    assert torch.equal(decode(case, window, WIDE, lanes=1), together)
    for i, row in enumerate(case.rows):
        alone = Case([row], case.queries[i : i + 1], case.expected, case.pool)
        assert torch.equal(decode(alone, window, WIDE, lanes=1), together[i : i + 1])


def test_an_empty_row_gives_zeros() -> None:
    case = make_case([(20, 1), (0, 1)], 2, 1, 16, None)
    step = step_of(case, False, 1)
    step.lengths[1] = 0
    out = torch.full_like(case.queries, float("nan"))
    parts = Workspace(2, 2, 16, torch.device("cpu"))
    decode_attention(
        case.queries, out, Pages.of(case.pool.tensor, LAYER), step.blocks, step.decode_tables,
        step.lengths, step.part_starts, parts, None, SHAPE, 1,
    )  # fmt: skip
    np.testing.assert_array_equal(out[1].numpy(), 0.0)
    torch.testing.assert_close(out[0].double(), case.expected[0], atol=1e-5, rtol=1e-5)
