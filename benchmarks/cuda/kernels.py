"""Every GPU kernel timed against its floor and beside torch. Used by `benchmarks.gpu`."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
from torch.nn.functional import linear as library_linear
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

from benchmarks.cuda.cases import Attention, Heads, Problem, dense, make_problem
from benchmarks.cuda.measure import Line, Machine, line, median_s
from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.triton.linear import linear
from common.model.triton.rope import Pages, rope_store
from common.model.triton.rows import add_rms_norm, swiglu
from common.model.triton.sampling import Draw, best_tokens, draw_tokens
from common.model.triton.tuning import tuning_for

DTYPE: Final = torch.bfloat16
LLAMA_8B: Final = Heads(32, 8, 128)
LLAMA_1B: Final = Heads(32, 8, 64)
EPS: Final = 1e-5


def time_all(machine: Machine) -> Iterator[Line | str]:
    """Every kernel at the sizes of the two models; a line of text for one that could not run."""
    works: list[partial[Iterator[Line]]] = []
    for heads in (LLAMA_8B, LLAMA_1B):
        for batch, context in ((32, 8192), (1, 8192), (128, 2048), (8, 32768)):
            works.append(partial(_decode, machine, heads, batch, context))
        for start, count in ((0, 8192), (6144, 2048), (0, 1024)):
            works.append(partial(_prefill, machine, heads, start, count))
    works += [partial(_rows, machine, 4096, 14336), partial(_rope, machine)]
    works += [partial(_sampling, machine), partial(_linear, machine)]
    for work in works:
        try:
            yield from work()
        except (RuntimeError, OutOfResources) as error:
            what = " ".join(str(argument) for argument in work.args[1:])
            name = work.func.__name__.strip("_")
            yield f"{name} {what} NOT MEASURED: {str(error).splitlines()[0]}"
        torch.cuda.empty_cache()


def _sets(machine: Machine, num_bytes: int) -> int:
    """Input sets that together are several times the cache."""
    return max(2, min(16, -(-4 * machine.cache_bytes // num_bytes)))


def _problem(machine: Machine, heads: Heads, shapes: list[tuple[int, int]]) -> Problem:
    tokens = sum(start + count for start, count in shapes)
    layers = _sets(machine, 2 * tokens * heads.num_kv * heads.dim * DTYPE.itemsize)
    return make_problem(shapes, heads, machine.device, dtype=DTYPE, layers=layers)


def _calls(run: Callable[[int], object], number: int) -> list[Callable[[], object]]:
    return [lambda i=i: run(i) for i in range(number)]  # type: ignore[misc]


def _decode(machine: Machine, heads: Heads, batch: int, context: int) -> Iterator[Line]:
    problem = _problem(machine, heads, [(context - 1, 1)] * batch)
    shape = tuning_for(machine.device).shape("decode", heads.dim)
    processors = torch.cuda.get_device_properties(machine.device).multi_processor_count
    lanes = max(1, -(-4 * processors // (batch * heads.num_kv)))
    attention = Attention(problem, shape, decode=True, lanes=lanes)
    layers = problem.pool.layout.num_layers
    seconds = median_s(_calls(attention.run, layers), machine.device)
    name = f"decode attention {heads}, {batch} rows of {context}"
    rivals = _rivals(machine, problem, causal=False)
    yield line(name, machine, seconds, problem.num_bytes, problem.flops, rivals)


def _prefill(machine: Machine, heads: Heads, start: int, count: int) -> Iterator[Line]:
    problem = _problem(machine, heads, [(start, count)])
    shape = tuning_for(machine.device).shape("prefill", heads.dim)
    attention = Attention(problem, shape, decode=False)
    layers = problem.pool.layout.num_layers
    seconds = median_s(_calls(attention.run, layers), machine.device)
    name = f"prefill attention {heads}, {count} after {start}"
    rivals = _rivals(machine, problem, causal=start == 0)
    yield line(name, machine, seconds, problem.num_bytes, problem.flops, rivals)


def _rivals(machine: Machine, problem: Problem, *, causal: bool) -> dict[str, float | str]:
    """Microseconds of others on dense K and V of the same sizes (they need no block table)."""
    found: dict[str, float | str] = {}
    layers = range(min(2, problem.pool.layout.num_layers))
    batch, count = len(problem.rows), len(problem.rows[0].tokens)
    q = problem.queries.view(batch, count, problem.heads.num, problem.heads.dim)
    sets: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in layers:
        pairs = [dense(problem, row, layer) for row in problem.rows]
        keys, values = (torch.stack(side) for side in zip(*pairs, strict=True))
        sets.append((keys, values))
    if count > 1 and not causal:
        found["sdpa"] = "no chunk with a prefix"
    else:
        turned = [(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()) for k, v in sets]
        query = q.transpose(1, 2).contiguous()

        def sdpa(i: int) -> object:
            return scaled_dot_product_attention(
                query, *turned[i], is_causal=causal, enable_gqa=True
            )

        found["sdpa"] = _rival(lambda: median_s(_calls(sdpa, len(turned)), machine.device))
        del turned
    if importlib.util.find_spec("flash_attn") is None:
        found["flash_attn"] = "not installed"
        return found
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def flash(i: int) -> object:
        return flash_attn_func(q, *sets[i], causal=count > 1)

    found["flash_attn"] = _rival(lambda: median_s(_calls(flash, len(sets)), machine.device))
    return found


def _rival(measure: Callable[[], float]) -> float | str:
    try:
        return measure() * 1e6
    except RuntimeError as error:  # out of memory, or a shape that it does not take
        return str(error).splitlines()[0][:80]


def _rows(machine: Machine, hidden: int, inner: int) -> Iterator[Line]:
    device = machine.device
    weight = torch.randn(hidden, device=device).to(DTYPE)
    for rows in (32, 8192):
        number = _sets(machine, rows * hidden * 2)
        xs = torch.randn(number, 2, rows, hidden, device=device).to(DTYPE)
        seconds = median_s(
            _calls(lambda i, xs=xs: add_rms_norm(xs[i, 0], xs[i, 1], weight, EPS), number),  # type: ignore[misc]
            device,
        )
        num_bytes = 4 * rows * hidden * 2
        yield line(f"add_rms_norm {rows} x {hidden}", machine, seconds, num_bytes, 0)
        number = _sets(machine, rows * inner * 4)
        gates = torch.randn(number, rows, 2 * inner, device=device, dtype=DTYPE)
        seconds = median_s(_calls(lambda i, gates=gates: swiglu(gates[i]), number), device)  # type: ignore[misc]
        yield line(f"swiglu {rows} x {inner}", machine, seconds, 3 * rows * inner * 2, 0)


def _rope(machine: Machine) -> Iterator[Line]:
    device, heads, size = machine.device, LLAMA_8B, 64
    width = heads.num + 2 * heads.num_kv
    for tokens in (32, 8192):
        number = _sets(machine, tokens * width * heads.dim * 2)
        layout = KvLayout(number, heads.num_kv, heads.dim, size, "bfloat16")
        pool = KvPool(layout, tokens // size + 1, device)
        qkv = torch.randn(number, tokens, width * heads.dim, device=device).to(DTYPE)
        slots = torch.randperm(tokens, device=device).to(torch.int32)
        positions = torch.arange(tokens, device=device, dtype=torch.int32)
        tables = tuple(torch.randn(tokens, heads.dim // 2, device=device).to(DTYPE) for _ in "cs")

        def run(i: int, qkv: torch.Tensor = qkv, pool: KvPool = pool, slots: torch.Tensor = slots,
                positions: torch.Tensor = positions,
                tables: tuple[torch.Tensor, ...] = tables) -> object:  # fmt: skip
            cos, sin = tables
            pages = Pages.of(pool.tensor, i)
            return rope_store(qkv[i], pages, slots, positions, (cos, sin), None, EPS)

        seconds = median_s(_calls(run, number), device)
        num_bytes = 2 * tokens * width * heads.dim * 2 + tokens * heads.dim * 2
        yield line(f"rope and kv store {heads}, {tokens} tokens", machine, seconds, num_bytes, 0)


def _sampling(machine: Machine) -> Iterator[Line]:
    device, vocab = machine.device, 128_256
    for rows in (1, 32, 128):
        number = _sets(machine, rows * vocab * 2)
        logits = torch.randn(number, rows, vocab, device=device).to(DTYPE)
        seconds = median_s(
            _calls(lambda i, logits=logits: best_tokens(logits[i]), number),  # type: ignore[misc]
            device,
        )
        torch_s = median_s(
            _calls(lambda i, logits=logits: logits[i].argmax(-1), number),  # type: ignore[misc]
            device,
        )
        rivals: dict[str, float | str] = {"torch": torch_s * 1e6}
        num_bytes = rows * vocab * 2
        yield line(f"argmax {rows} x {vocab}", machine, seconds, num_bytes, 0, rivals)
    rows = 32
    logits = torch.randn(rows, vocab, device=device)
    draws = [Draw(0.8, 0.0, 50, 0.95, i, 0, 0) for i in range(rows)]
    # Its parameters come from the host, which a graph cannot capture: timed with its launch.
    draw_tokens(logits, draws)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        draw_tokens(logits, draws)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    seconds = sorted(times)[len(times) // 2]
    yield line(f"draw {rows} x {vocab}, top-k, top-p", machine, seconds, rows * vocab * 4, 0)


def _linear(machine: Machine) -> Iterator[Line]:
    """The batch-invariant product beside the library's: what the invariant mode costs."""
    device = machine.device
    shape = tuning_for(device).shape("linear")
    for rows in (1, 32, 8192):
        columns, depth = 28_672, 4_096
        number = max(2, -(-4 * machine.cache_bytes // (columns * depth * 2)))
        weights = torch.randn(number, columns, depth, device=device).to(DTYPE)
        x = torch.randn(rows, depth, device=device).to(DTYPE)

        def ours(i: int, x: torch.Tensor = x, weights: torch.Tensor = weights) -> object:
            return linear(x, weights[i], None, shape)

        def theirs(i: int, x: torch.Tensor = x, weights: torch.Tensor = weights) -> object:
            return library_linear(x, weights[i])

        seconds = median_s(_calls(ours, number), device)
        library = median_s(_calls(theirs, number), device)
        num_bytes = 2 * (columns * depth + rows * (columns + depth))
        flops = 2 * rows * columns * depth
        name = f"invariant linear {rows} x {depth} x {columns}"
        yield line(name, machine, seconds, num_bytes, flops, {"library": library * 1e6})
