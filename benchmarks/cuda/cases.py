"""Ragged attention problems over a paged pool, and their answer in float64. Used by the kernel
parts of `benchmarks.gpu`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.triton.decode import Workspace, decode_attention
from common.model.triton.inputs import Step, pack
from common.model.triton.prefill import prefill_attention, tokens_per_tile
from common.model.triton.rope import Pages
from common.model.triton.tuning import Shape


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention."""

    num: int
    num_kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.num}/{self.num_kv} x {self.dim}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Queries of several rows over one pool whose layers are as many input sets."""

    heads: Heads
    rows: list[Row]
    queries: torch.Tensor
    """[tokens, heads, dim]"""
    pool: KvPool
    window: int | None

    @property
    def pairs(self) -> int:
        """Scores per query head that causality leaves."""
        total = 0
        for row in self.rows:
            for position in range(row.start, row.start + len(row.tokens)):
                seen = position + 1
                total += seen if self.window is None else min(seen, self.window)
        return total

    @property
    def flops(self) -> int:
        return 4 * self.pairs * self.heads.num * self.heads.dim

    @property
    def num_bytes(self) -> int:
        """Of one layer: K and V of the whole context once, queries in, results out."""
        contexts = [row.start + len(row.tokens) for row in self.rows]
        if self.window is not None and all(len(row.tokens) == 1 for row in self.rows):
            contexts = [min(context, self.window) for context in contexts]
        kv = 2 * sum(contexts) * self.heads.num_kv * self.heads.dim
        return (kv + 2 * self.queries.numel()) * self.queries.element_size()


def make_problem(
    shapes: Sequence[tuple[int, int]],
    heads: Heads,
    device: torch.device,
    *,
    dtype: torch.dtype,
    window: int | None = None,
    block_size: int = 64,
    layers: int = 1,
    seed: int = 0,
) -> Problem:
    """shapes: (start, count) per row. Blocks are scattered; slots that hold no token are NaN."""
    torch.manual_seed(seed)
    layout = KvLayout(layers, heads.num_kv, heads.dim, block_size, str(dtype).split(".")[1])
    needed = [layout.blocks_for(start + count) for start, count in shapes]
    pool = KvPool(layout, sum(needed) + 1, device)
    pool.tensor.normal_()
    order = torch.randperm(pool.num_blocks).tolist()
    rows = []
    for (start, count), number in zip(shapes, needed, strict=True):
        blocks = [order.pop() for _ in range(number)]
        rows.append(Row([0] * count, start, blocks))
        end = (start + count) % block_size
        if end:
            pool.tensor[blocks[-1], :, :, :, end:] = float("nan")
    pool.tensor[order] = float("nan")
    tokens = sum(count for _, count in shapes)
    queries = torch.randn(tokens, heads.num, heads.dim, device=device).to(dtype)
    return Problem(heads, rows, queries, pool, window)


def answer(problem: Problem, layer: int) -> torch.Tensor:
    """[tokens, heads, dim] float64."""
    results = []
    taken = 0
    group = problem.heads.num // problem.heads.num_kv
    for row in problem.rows:
        count = len(row.tokens)
        queries = problem.queries[taken : taken + count].double()
        taken += count
        keys, values = dense(problem, row, layer)
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * problem.heads.dim**-0.5
        at = torch.arange(row.start, row.start + count, device=scores.device)[:, None]
        seen = torch.arange(len(keys), device=scores.device)[None, :]
        hidden = seen > at
        if problem.window is not None:
            hidden |= seen <= at - problem.window
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(results)


def dense(problem: Problem, row: Row, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a row, [context, kv_heads, dim] each."""
    blocks = torch.tensor(row.blocks, device=problem.queries.device)
    kv = problem.pool.tensor[blocks, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)
    keys, values = kv[:, : row.start + len(row.tokens)].unbind(0)
    return keys, values


class Attention:
    """A problem ready to run, layer by layer, by one of the two kernels."""

    def __init__(self, problem: Problem, shape: Shape, *, decode: bool, lanes: int = 1) -> None:
        """decode: every row has one token."""
        self._problem, self._shape, self._lanes = problem, shape, lanes
        self._decode = decode
        heads = problem.heads
        per_tile = tokens_per_tile(shape, heads.num // heads.num_kv) if not decode else 1
        size = problem.pool.layout.block_size
        packed = pack(problem.rows, [], size, per_tile, invariant=not decode)
        device = problem.queries.device
        self._step = Step.of(torch.from_numpy(packed.numbers).to(device), packed)
        self._workspace = Workspace(max(1, packed.num_parts), heads.num, heads.dim, device)
        self._workspace.partials.fill_(float("nan"))
        self.out = torch.full_like(problem.queries, float("nan"))

    def run(self, layer: int) -> torch.Tensor:
        problem, step = self._problem, self._step
        pages = Pages.of(problem.pool.tensor, layer)
        if self._decode:
            decode_attention(
                problem.queries,
                self.out,
                pages,
                step.blocks,
                step.decode_tables,
                step.lengths,
                step.part_starts,
                self._workspace,
                problem.window,
                self._shape,
                self._lanes,
            )
        else:
            prefill_attention(
                problem.queries,
                self.out,
                pages,
                step.blocks,
                step.table_starts,
                step.row_starts,
                step.row_tokens,
                step.row_counts,
                step.tile_rows,
                step.tile_firsts,
                problem.window,
                self._shape,
            )
        return self.out
