"""Every GPU kernel against a reference in higher precision, on fresh random ragged inputs.

Errors are ||out - ref|| / ||ref||; a NaN never passes. Used by `benchmarks.gpu`, whose results are
worth nothing for a kernel that fails here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.cuda.cases import Attention, Heads, answer, make_problem
from benchmarks.cuda.measure import Machine
from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.triton.linear import linear
from common.model.triton.rope import Pages, rope_store
from common.model.triton.rows import add_rms_norm, rms_norm, swiglu
from common.model.triton.sampling import Draw, best_tokens, draw_tokens
from common.model.triton.tuning import tuning_for

LIMITS: Final = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
EPS: Final = 1e-5
_DRAW_TOLERANCE: Final = 1e-6
"""Of the total: how far a draw may lie from the boundary of its token in float64."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison."""

    kernel: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def check_all(machine: Machine, *, small: bool) -> Iterator[Check]:
    """small: sizes for the interpreter, in float32: it has no bfloat16 products."""
    dtype = torch.float32 if small else torch.bfloat16
    yield from _rows(machine.device, dtype, small)
    yield from _rope(machine.device, dtype)
    yield from _linear(machine.device, dtype, small)
    yield from _sampling(machine.device, small)
    yield from _attention(machine.device, dtype, small)


def _check(name: str, out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> Check:
    error = (out.double() - reference).norm() / reference.norm()
    return Check(name, float(error), LIMITS[dtype])


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def _rows(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Check]:
    for rows, size in [(1, 64), (3, 1030)] if small else [(1, 4096), (333, 4096), (77, 5120)]:
        x, residual, weight = (
            torch.randn(*shape, device=device).to(dtype)
            for shape in ((rows, size), (rows, size), (size,))
        )
        wide, wide_weight = x.double(), weight.double()
        label = f"{rows} x {size}"
        out = rms_norm(x, weight, EPS)
        yield _check(f"rms_norm {label}", out, _norm(wide, wide_weight), dtype)
        summed = wide + residual.double()
        out = add_rms_norm(x, residual, weight, EPS)
        yield _check(f"add_rms_norm {label}", out, _norm(summed, wide_weight), dtype)
        yield _check(f"add_rms_norm {label}, the sum", residual, summed, dtype)
        gate_up = torch.randn(rows, 2 * size, device=device).to(dtype)
        gate, up = gate_up.double().chunk(2, dim=-1)
        yield _check(f"swiglu {label}", swiglu(gate_up), gate * gate.sigmoid() * up, dtype)


def _rope(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    tokens, size, layer = 37, 64, 1
    for heads in (Heads(8, 8, 64), Heads(8, 2, 80), Heads(32, 8, 128), Heads(8, 1, 256)):
        layout = KvLayout(2, heads.num_kv, heads.dim, size, str(dtype).split(".")[1])
        pool = KvPool(layout, 3, device, poison=True)
        width = heads.num + 2 * heads.num_kv
        qkv = torch.randn(tokens, width * heads.dim, device=device).to(dtype)
        positions = torch.randint(0, 4096, (tokens,), device=device).to(torch.int32)
        slots = torch.randperm(3 * size, device=device)[:tokens].to(torch.int32)
        half = heads.dim // 2
        steps = torch.arange(half, device=device) / half
        angles = torch.arange(4096, device=device)[:, None] * 10_000.0**-steps
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        q_norm, k_norm = (torch.randn(heads.dim, device=device).to(dtype) for _ in range(2))
        norms = (q_norm, k_norm)
        out = rope_store(
            qkv, Pages.of(pool.tensor, layer), slots, positions, (cos, sin), norms, EPS
        )
        wide = qkv.double().view(tokens, width, heads.dim)
        q, k, v = wide.split((heads.num, heads.num_kv, heads.num_kv), dim=1)
        rotated = []
        for part, weight in zip((q, k), norms, strict=True):
            x, y = _norm(part, weight.double()).chunk(2, dim=-1)
            c, s = (t[positions.long()][:, None].double() for t in (cos, sin))
            rotated.append(torch.cat((x * c - y * s, y * c + x * s), dim=-1))
        yield _check(f"rope {heads}", out, rotated[0], dtype)
        where = slots.long()
        stored = pool.tensor[where // size, layer, :, :, where % size]
        reference = torch.stack((rotated[1], v), dim=1)
        yield _check(f"kv store {heads}", stored, reference, dtype)
        untouched = int(pool.tensor.isnan().sum())
        wanted = pool.tensor.numel() - stored.numel()
        yield Check(f"kv store {heads}, elsewhere", abs(untouched - wanted), 0)


def _linear(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Check]:
    shape = tuning_for(device).shape("linear")
    for rows, columns, depth in [(3, 40, 70)] if small else [(1, 6144, 4096), (300, 1000, 1100)]:
        x = torch.randn(rows, depth, device=device).to(dtype)
        weight = torch.randn(columns, depth, device=device).to(dtype)
        bias = torch.randn(columns, device=device).to(dtype)
        reference = x.double() @ weight.double().T + bias.double()
        out = linear(x, weight, bias, shape)
        yield _check(f"linear {rows} x {depth} x {columns}", out, reference, dtype)
        alone = linear(x[-1:].contiguous(), weight, bias, shape)
        differ = int((alone != out[-1:]).sum())
        yield Check(f"linear {rows} x {depth} x {columns}, bits of a row alone", differ, 0)


def _sampling(device: torch.device, small: bool) -> Iterator[Check]:
    rows, vocab = (4, 700) if small else (32, 128_256)
    logits = torch.randn(rows, vocab, device=device) * 3
    wrong = int((best_tokens(logits) != logits.argmax(-1)).sum())
    yield Check(f"argmax {rows} x {vocab}", wrong, 0)
    cases: list[tuple[float, int, float]] = [(1.0, 0, 1.0), (0.7, 40, 0.9)]
    for temperature, top_k, top_p in cases[1:] if small else cases:
        draws = [Draw(temperature, 0.0, top_k, top_p, 7 * i, 0, i) for i in range(rows)]
        tokens = draw_tokens(logits, draws).long()
        worst = _distance(logits.double() / temperature, tokens, draws)
        yield Check(f"draw {rows} x {vocab}, top_k {top_k}, top_p {top_p}", worst, _DRAW_TOLERANCE)


def _distance(logits: torch.Tensor, tokens: torch.Tensor, draws: list[Draw]) -> float:
    """How far outside its token's part of the CDF a draw lies at most."""
    from common.model.philox import uniforms

    worst = 0.0
    numbers = uniforms([(draw.seed, draw.choice, draw.index) for draw in draws]).tolist()
    for line, token, draw, number in zip(logits, tokens.tolist(), draws, numbers, strict=True):
        if draw.top_k:
            line = line.masked_fill(line < line.topk(draw.top_k).values[-1], float("-inf"))
        probabilities = line.softmax(-1)
        if draw.top_p < 1:
            best = probabilities.sort(descending=True).values
            kept = int((best.cumsum(-1) - best < draw.top_p).sum())
            probabilities = probabilities.where(probabilities >= best[kept - 1], 0)
        cdf = probabilities.cumsum(-1) / probabilities.sum()
        high = float(cdf[token])
        low = high - float(probabilities[token] / probabilities.sum())
        worst = max(worst, low - number, number - high)
    return worst


def _attention(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Check]:
    tuning = tuning_for(device)
    ragged = [(0, 1), (0, 17), (31, 33)]
    contexts = [1, 64, 257]
    if not small:
        ragged += [(0, 64), (63, 65), (1000, 1), (1023, 777), (0, 2050)]
        contexts += [15, 63, 65, 255, 256, 1000, 4097, 5000]
    dims = (80,) if small else (64, 80, 128, 256)
    groups = (4,) if small else (1, 4, 8)
    for dim in dims:
        for group in groups:
            for window in (None, 100):
                heads = Heads(2 * group, 2, dim)
                label = f"{heads}, window {window}"
                problem = make_problem(ragged, heads, device, dtype=dtype, window=window)
                shape = tuning.shape("prefill", dim, dtype.itemsize)
                out = Attention(problem, shape, decode=False).run(0)
                yield _check(f"prefill attention {label}", out, answer(problem, 0), dtype)
                rows = [(context - 1, 1) for context in contexts]
                problem = make_problem(rows, heads, device, dtype=dtype, window=window, layers=2)
                shape = tuning.shape("decode", dim, dtype.itemsize)
                reference = answer(problem, 1)
                outs = []
                for lanes in (1, 3):
                    outs.append(Attention(problem, shape, decode=True, lanes=lanes).run(1))
                yield _check(f"decode attention {label}", outs[0], reference, dtype)
                differ = int((outs[0] != outs[1]).sum())
                yield Check(f"decode attention {label}, bits with other lanes", differ, 0)
