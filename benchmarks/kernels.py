"""The CPU kernels against their floors: `python -m benchmarks.kernels [--threads N] [--keep]`.

One line per kernel. The floor is the larger of the bytes that must be read over the measured read
bandwidth and the operations over the measured rate of a large product by torch (oneDNN) in
bfloat16, or in 8-bit integers where those are multiplied, all measured in the same run with the
same threads. Operands are taken in turn from sets larger than the last cache, as the layers of a
model are; where they lie in the caches, the floor of memory can be beaten. Times are medians.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Final

import torch

from benchmarks import machine as provenance
from benchmarks import rates
from benchmarks.compare.paths import RESULTS
from benchmarks.kernels_model import (
    BLOCK,
    DTYPE,
    llama_135m,
    matrix_bytes,
    numel,
    random_matrix,
    random_weights,
    step_rows,
)
from benchmarks.kernels_table import HEADER, Line, Machine, cells, line, page, told
from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.cpu import kernels, library
from common.model.quantize import SCHEMES, Matrix, quantize
from common.model.runner import ModelRunner
from common.model.spec import ModelSpec
from common.model.weights import MatrixName, quantize_weights

SET_BYTES: Final = 256 << 20
MIN_CALLS: Final = 7
MANY_COLUMNS: Final = 10_000
TIME_S: Final = 0.6
"""Of one line, about."""


def median_s(call: Callable[[], object]) -> float:
    """Seconds of one call, after one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < TIME_S:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_machine(threads: int) -> Machine:
    torch.set_num_threads(threads)
    memory = torch.ones(SET_BYTES // 4 // (64 * threads) * (64 * threads))
    native = library.load()
    reading = median_s(lambda: kernels.read(native, memory, threads))
    a, b = torch.randn(1024, 2048).to(DTYPE), torch.randn(4096, 2048).to(DTYPE)
    product = median_s(lambda: torch.nn.functional.linear(a, b))
    return Machine(
        threads=threads,
        bytes_per_s=memory.numel() * 4 / reading,
        flops_per_s=2 * a.numel() * len(b) / product,
        integers_per_s=integers_per_s(threads),
    )


def integers_per_s(threads: int) -> float:
    """Of products of 8-bit integers. oneDNN gains little from a second thread, so that it counts
    what each core does with a product of its own while the others are busy with theirs."""
    together = rates.int8_gop_s()
    if threads == 1:
        return together * 1e9
    usable = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    os.sched_setaffinity(0, usable[:1])
    try:
        with rates.busy(usable[1:threads]):
            one = rates.int8_gop_s()
    finally:
        os.sched_setaffinity(0, usable)
        torch.set_num_threads(threads)
    return max(together, threads * one) * 1e9


def measure_linear(
    machine: Machine, columns: int, depth: int, scheme: str | None = None
) -> Iterator[Line]:
    native = library.load()
    dense = random_matrix(columns, depth)
    weight: Matrix = dense if scheme is None else quantize(dense, SCHEMES[scheme])
    num_bytes = matrix_bytes(weight)
    count = max(1, SET_BYTES // num_bytes)
    linears = cycle([kernels.Linear(native, weight, machine.threads) for _ in range(count)])
    # The logits are of the rows that sample: never many.
    for rows in (1, 8, 16, 32) if columns > MANY_COLUMNS else (1, 8, 16, 32, 128, 512):
        a = kernels.padded(torch.randn(rows, depth).to(DTYPE))
        to = torch.empty(rows, -(-columns // kernels.ALIGNMENT) * kernels.ALIGNMENT)
        seconds = median_s(lambda a=a, to=to: next(linears).apply(a, to))  # type: ignore[misc]
        name = f"linear {scheme or 'bfloat16'} {depth}x{columns}, {rows} rows"
        yield line(name, machine, seconds, num_bytes, 2 * rows * columns * depth, scheme)


def measure_attention(machine: Machine, group: int, head_dim: int) -> Iterator[Line]:
    """One kv head and its group of query heads."""
    assert machine.threads == 1, machine
    layout = KvLayout(30, 3, head_dim, BLOCK, "bfloat16")
    pool = KvPool(layout, min(1024, SET_BYTES // layout.block_bytes + 1))
    pool.tensor.normal_()
    attention = kernels.Attention(library.load(), pool.tensor, group)
    heads = cycle([(layer, head) for layer in range(30) for head in range(3)])
    for start, count in ((511, 1), (4095, 1), (0, 512), (1536, 512)):
        end = start + count
        blocks = (torch.randperm(layout.blocks_for(end)) % pool.num_blocks).to(torch.int32)
        queries = torch.randn(count, group, head_dim).to(DTYPE)

        def call(
            queries: torch.Tensor = queries, blocks: torch.Tensor = blocks, start: int = start
        ) -> None:
            layer, head = next(heads)
            attention.apply(queries, blocks, layer=layer, kv_head=head, start=start)

        pairs = sum(range(start + 1, end + 1))
        num_bytes = 2 * end * head_dim * DTYPE.itemsize
        name = f"attention {group}x{head_dim}, {count} tokens after {start}"
        yield line(name, machine, median_s(call), num_bytes, 4 * pairs * group * head_dim)


def measure_rows(machine: Machine, spec: ModelSpec) -> Iterator[Line]:
    """The elementwise kernels, on 32 rows that lie in the caches."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    assert machine.threads == 1, machine
    native = library.load()
    x, weight = torch.randn(32, hidden), torch.ones(hidden)
    seconds = median_s(lambda: kernels.rms_norm(native, x, weight, 1e-5, DTYPE))
    yield line(f"rms_norm {hidden}, 32 rows", machine, seconds, x.numel() * 6, 4 * x.numel())
    gate, up = torch.randn(2, 32 * inner)
    # Rotated and written where attention reads it, as it is for the KV cache.
    count = 32 * (spec.num_heads + spec.num_kv_heads)
    heads = torch.randn(count, spec.head_dim)
    cos, sin = torch.randn(2, spec.head_dim // 2)
    seconds = median_s(lambda: kernels.rotate(native, heads, cos, sin, DTYPE))
    name = f"rotate and store {spec.head_dim}, {count} heads"
    yield line(name, machine, seconds, heads.numel() * 6, 3 * heads.numel())
    seconds = median_s(lambda: kernels.swiglu(native, gate, up, DTYPE))
    yield line(f"swiglu {inner}, 32 rows", machine, seconds, gate.numel() * 10, 20 * gate.numel())


def measure_steps(machine: Machine, spec: ModelSpec, scheme: str | None = None) -> Iterator[Line]:
    """Whole steps: decode after short and long contexts, and the chunks of a prompt of 2,048."""
    weights = random_weights(spec)
    if scheme is not None:
        weights = quantize_weights(weights, SCHEMES[scheme])
    pool = KvPool(spec.layout(BLOCK, "bfloat16"), 2_112)
    pool.tensor.zero_()
    runner = ModelRunner(spec, weights, pool, kernels="native", threads=machine.threads)
    names: tuple[MatrixName, ...] = ("qkv", "o", "gate_up", "down")
    matrices = [layer.matrix(name) for layer in weights.layers for name in names]
    last = weights.quantized_head or weights.head
    head, body = numel(last), sum(map(numel, matrices))
    weight_bytes = sum(map(matrix_bytes, (*matrices, last)))
    del matrices, last
    del weights
    kv_bytes = pool.block_bytes // BLOCK
    decodes = [(batch, 1, start) for start in (159, 1023) for batch in (1, 8, 32)]
    shapes = [*decodes, (1, 128, 0), *((1, 512, start) for start in range(0, 2048, 512))]
    for batch, count, start in shapes:
        rows = list(step_rows(batch, count, start))
        seconds = median_s(lambda rows=rows: runner.step(rows))  # type: ignore[misc]
        tokens, end = batch * count, start + count
        pairs = batch * sum(range(start + 1, end + 1))
        attention = 4 * pairs * spec.num_heads * spec.head_dim * spec.num_layers
        flops = 2 * tokens * body + 2 * batch * head + attention
        num_bytes = weight_bytes + batch * end * kv_bytes
        model = f"{scheme or 'bfloat16'} {spec.hidden_size}x{spec.num_layers}"
        name = f"step {model}, {batch} x {count} after {start}"
        yield line(name, machine, seconds, num_bytes, flops, scheme, attention)


def measure(machines: tuple[Machine, Machine]) -> Iterator[Line]:
    """machines: of one thread, and of all of them."""
    one, all_threads = machines
    spec = llama_135m()
    torch.set_num_threads(1)
    yield from measure_rows(one, spec)
    yield from measure_attention(one, spec.num_heads // spec.num_kv_heads, spec.head_dim)
    for scheme in (None, *SCHEMES):
        for columns, depth in ((3_072, 576), (576, 1_536), (49_152, 576)):
            yield from measure_linear(all_threads, columns, depth, scheme)
    for scheme in (None, *SCHEMES):
        yield from measure_steps(all_threads, spec, scheme)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    usable = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=usable, help="none: a thread for each core")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--keep", action="store_true", help="write benchmarks/results/kernels.json and kernels.md"
    )
    arguments = parser.parse_args(argv)
    document = provenance.provenance() | {"busy_share": provenance.busy_share()}
    torch.manual_seed(0)
    machines = measure_machine(1), measure_machine(arguments.threads)
    for machine in dict.fromkeys(machines):
        print(told(machine), flush=True)
    lines: list[Line] = []
    widths = (48, 9, 9, 6, 8, 7, 8)
    print(" ".join(f"{cell:>{width}}" for cell, width in zip(HEADER, widths, strict=True)))
    for one in measure(machines):
        lines.append(one)
        shown = zip(cells(one), widths, strict=True)
        print(" ".join(f"{cell:>{width}}" for cell, width in shown), flush=True)
    document |= {
        "machines": [asdict(machine) for machine in machines],
        "lines": [asdict(one) for one in lines],
    }
    paths = [arguments.json] if arguments.json else []
    if arguments.keep:
        paths.append(RESULTS / "kernels.json")
        (RESULTS / "kernels.md").write_text(page(document, machines, lines))
    for path in paths:
        path.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
