"""Triton kernels that choose tokens: the largest logit, and draws by counter-based numbers.

Called by `common.model.triton.decoder`. The draws are those of `common.model.sampler`: one number
of `philox(seed, choice, output index)`, and the inverse of a CDF in float64 in the order of token
ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from common.model.philox import ROUNDS

_BLOCK: Final = 4096
_MAX_TOKEN: Final = 2**31 - 1


@triton.jit
def _best_part(logits, values, ids, vocab, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    x = tl.load(logits + row * vocab + columns, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 0)
    first = tl.min(tl.where((x == best) & inside, columns, LARGEST), 0)
    tl.store(values + row * tl.num_programs(1) + part, best)
    tl.store(ids + row * tl.num_programs(1) + part, first)


@triton.jit
def _best(values, ids, out, parts, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < parts
    x = tl.load(values + row * parts + columns, mask=inside, other=float("-inf"))
    tokens = tl.load(ids + row * parts + columns, mask=inside, other=LARGEST)
    tl.store(out + row, tl.min(tl.where(x == tl.max(x, 0), tokens, LARGEST), 0))


@triton.jit
def _scaled(logits, begin, vocab, temperature, BLOCK: tl.constexpr):
    """A block of logits over the temperature; -inf past the end."""
    columns = begin + tl.arange(0, BLOCK)
    x = tl.load(logits + columns, mask=columns < vocab, other=float("-inf"))
    x = tl.div_rn(x, temperature)
    return tl.where(x == 0, 0.0, x)  # one zero, so that the order of bits is that of values


@triton.jit
def _ordered(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _draw(
    logits,
    out,
    temperatures,
    floors,
    limits,
    nuclei,
    seeds,
    choices,
    indices,
    vocab,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * vocab
    temperature = tl.load(temperatures + row)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        highest = tl.maximum(highest, _scaled(line, begin, vocab, temperature, BLOCK))
    top = tl.max(highest, 0)
    # min-p: the logarithm of the least probability, relative to the best token's.
    floor = tl.load(floors + row) + top
    least = -2147483648 + tl.zeros([1], tl.int64)
    least = tl.maximum(
        least, _ordered(tl.where(floor == 0, 0.0, floor) + tl.zeros([1], tl.float32))
    )

    limit = tl.load(limits + row)
    if limit > 0:
        # The largest threshold that `limit` logits reach, bit by bit.
        low = -2147483648 + tl.zeros([1], tl.int64)
        high = 2147483647 + tl.zeros([1], tl.int64)
        for _ in range(32):
            middle = low + (high - low + 1) // 2
            count = tl.zeros([BLOCK], tl.int32)
            for begin in range(0, vocab, BLOCK):
                keys = _ordered(_scaled(line, begin, vocab, temperature, BLOCK))
                reached = (keys >= middle) & (begin + tl.arange(0, BLOCK) < vocab)
                count += reached.to(tl.int32)
            enough = tl.sum(count, 0) >= limit
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        least = tl.maximum(least, low)

    nucleus = tl.load(nuclei + row)
    if nucleus < 1.0:
        # The least threshold above which less than `nucleus` of all lies.
        mass = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, vocab, BLOCK):
            x = _scaled(line, begin, vocab, temperature, BLOCK)
            mass += tl.where(_ordered(x) >= least, tl.exp(x - top).to(tl.float64), 0.0)
        wanted = tl.sum(mass, 0) * nucleus
        low = -2147483648 + tl.zeros([1], tl.int64)
        high = 2147483647 + tl.zeros([1], tl.int64)
        for _ in range(32):
            middle = low + (high - low) // 2
            above = tl.zeros([BLOCK], tl.float64)
            for begin in range(0, vocab, BLOCK):
                x = _scaled(line, begin, vocab, temperature, BLOCK)
                keys = _ordered(x)
                kept = (keys >= least) & (keys > middle)
                above += tl.where(kept, tl.exp(x - top).to(tl.float64), 0.0)
            less = tl.sum(above, 0) < wanted
            high = tl.where(less, middle, high)
            low = tl.where(less, low, middle + 1)
        least = tl.maximum(least, high)

    mass = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, vocab, BLOCK):
        x = _scaled(line, begin, vocab, temperature, BLOCK)
        mass += tl.where(_ordered(x) >= least, tl.exp(x - top).to(tl.float64), 0.0)
    seed = tl.load(seeds + row)
    index = tl.load(indices + row).to(tl.uint32)
    choice = tl.load(choices + row).to(tl.uint32)
    nothing = index ^ index
    first, second, _, _ = tl.philox(seed, index, choice, nothing, nothing, ROUNDS)
    mantissa = ((first >> 5).to(tl.int64) << 26) | (second >> 6).to(tl.int64)
    target = mantissa.to(tl.float64) * 1.1102230246251565e-16 * tl.sum(mass, 0)

    chosen = tl.full([BLOCK], LARGEST, tl.int32)
    last = tl.full([BLOCK], 0, tl.int32)
    before = tl.zeros([1], tl.float64)
    for begin in range(0, vocab, BLOCK):
        x = _scaled(line, begin, vocab, temperature, BLOCK)
        columns = begin + tl.arange(0, BLOCK)
        weights = tl.where(_ordered(x) >= least, tl.exp(x - top).to(tl.float64), 0.0)
        reached = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
        chosen = tl.minimum(chosen, tl.where(reached, columns, LARGEST))
        last = tl.maximum(last, tl.where(weights > 0, columns, 0))
        before += tl.sum(weights, 0)
    token = tl.min(chosen, 0)
    # u < 1, but rounding may leave the target past the last token.
    token = tl.where(token == LARGEST, tl.max(last, 0), token)
    tl.store(out + row, token)


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of each line. [rows, vocab] to [rows] int32."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, _BLOCK)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _best_part[(rows, parts)](
        logits, values, ids, vocab, BLOCK=_BLOCK, LARGEST=_MAX_TOKEN, num_warps=8
    )
    _best[(rows,)](values, ids, out, parts, BLOCK=triton.next_power_of_2(parts), LARGEST=_MAX_TOKEN)
    return out


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is drawn; see `common.sampling.SamplingParams`."""

    temperature: float
    min_p: float
    top_k: int
    """0: all."""
    top_p: float
    seed: int
    choice: int
    index: int


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token per line. logits: [rows, vocab] float32, contiguous, before the temperature,
    left unchanged. Returns [rows] int32."""
    device = logits.device
    rows, vocab = logits.shape
    assert rows == len(draws) and logits.dtype == torch.float32, (logits.shape, logits.dtype)

    def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    out = torch.empty(rows, dtype=torch.int32, device=device)
    _draw[(rows,)](
        logits,
        out,
        column([draw.temperature for draw in draws], torch.float32),
        column([draw.min_p for draw in draws], torch.float32).log(),
        column([draw.top_k if draw.top_k < vocab else 0 for draw in draws], torch.int32),
        column([draw.top_p for draw in draws], torch.float64),
        column([_signed(draw.seed, 64) for draw in draws], torch.int64),
        column([_signed(draw.choice, 32) for draw in draws], torch.int32),
        column([_signed(draw.index, 32) for draw in draws], torch.int32),
        vocab,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        ROUNDS=ROUNDS,
        LARGEST=_MAX_TOKEN,
        num_warps=16,
    )
    return out


def _signed(number: int, bits: int) -> int:
    """The same bits as a signed integer."""
    word = number & ((1 << bits) - 1)
    return word - (1 << bits) if word >> (bits - 1) else word
