"""The CPU kernels against their floors: `python -m benchmarks.kernels [--threads N] [--json FILE]`.

One line per kernel. The floor is the larger of the bytes that must be read over the measured read
bandwidth and the floating-point operations over the measured rate of a large bfloat16 product by
torch (oneDNN), both measured in the same run with the same threads. Operands are taken in turn from
sets larger than the last cache, as the layers of a model are. Times are medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Final

import torch

from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.batch import Row, Sample
from common.model.cpu import kernels, library
from common.model.quantize import SCHEMES, Matrix, QuantizedMatrix, quantize
from common.model.rope_spec import RopeSpec
from common.model.runner import ModelRunner
from common.model.spec import ModelSpec
from common.model.weights import LayerWeights, MatrixName, Weights, quantize_weights
from common.sampling import SamplingParams

DTYPE: Final = torch.bfloat16
SET_BYTES: Final = 256 << 20
BLOCK: Final = 16
MIN_CALLS: Final = 7
TIME_S: Final = 1.0
"""Of one line, about."""
GREEDY: Final = SamplingParams(max_tokens=2, temperature=0.0)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a floor is made of."""

    threads: int
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement."""

    kernel: str
    threads: int
    ms: float
    floor_ms: float
    bound: str
    """`memory` or `compute`: which floor is the larger one."""
    gb_per_s: float
    gflop_per_s: float

    @property
    def share(self) -> float:
        """Of the floor: 1 is perfect."""
        return self.floor_ms / self.ms


def median_s(call: Callable[[], object]) -> float:
    """Seconds of one call, after one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < TIME_S:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def line(name: str, machine: Machine, seconds: float, num_bytes: float, flops: float) -> Line:
    memory, compute = num_bytes / machine.bytes_per_s, flops / machine.flops_per_s
    return Line(
        kernel=name,
        threads=machine.threads,
        ms=seconds * 1e3,
        floor_ms=max(memory, compute) * 1e3,
        bound="memory" if memory > compute else "compute",
        gb_per_s=num_bytes / seconds / 1e9,
        gflop_per_s=flops / seconds / 1e9,
    )


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
    )


def measure_linear(
    machine: Machine, columns: int, depth: int, scheme: str | None = None
) -> Iterator[Line]:
    """The floor of operations is that of bfloat16, for quantised weights too."""
    native = library.load()
    dense = random_matrix(columns, depth)
    weight: Matrix = dense if scheme is None else quantize(dense, SCHEMES[scheme])
    num_bytes = matrix_bytes(weight)
    count = max(1, SET_BYTES // num_bytes)
    linears = cycle([kernels.Linear(native, weight, machine.threads) for _ in range(count)])
    for rows in (1, 8, 16, 32, 128, 512):
        a = kernels.padded(torch.randn(rows, depth).to(DTYPE))
        to = torch.empty(rows, -(-columns // kernels.ALIGNMENT) * kernels.ALIGNMENT)
        seconds = median_s(lambda a=a, to=to: next(linears).apply(a, to))  # type: ignore[misc]
        name = f"linear {scheme or 'bfloat16'} {depth}x{columns}, {rows} rows"
        yield line(name, machine, seconds, num_bytes, 2 * rows * columns * depth)


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


def measure_rows(machine: Machine, hidden: int, inner: int) -> Iterator[Line]:
    """The elementwise kernels, on 32 rows that lie in the caches."""
    assert machine.threads == 1, machine
    native = library.load()
    x, weight = torch.randn(32, hidden), torch.ones(hidden)
    seconds = median_s(lambda: kernels.rms_norm(native, x, weight, 1e-5, DTYPE))
    yield line(f"rms_norm {hidden}, 32 rows", machine, seconds, x.numel() * 6, 4 * x.numel())
    gate, up = torch.randn(2, 32 * inner)
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
        yield line(name, machine, seconds, num_bytes, flops)


def step_rows(batch: int, count: int, start: int) -> Iterator[Row]:
    per_row = -(-(start + count) // BLOCK)
    known = [7] * (start + count)
    for i in range(batch):
        blocks = range(i * per_row, (i + 1) * per_row)
        yield Row(known[start:], start, blocks, (Sample(0, GREEDY, known, len(known)),))


def numel(matrix: Matrix) -> int:
    return (matrix.values if isinstance(matrix, QuantizedMatrix) else matrix).numel()


def matrix_bytes(matrix: Matrix) -> int:
    """That a product reads."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.values.numel() * matrix.scheme.bits // 8 + matrix.scales.numel() * 4
    return matrix.numel() * matrix.itemsize


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns).mul_(columns**-0.5).to(DTYPE)


def random_weights(spec: ModelSpec) -> Weights:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ones = torch.ones(hidden, dtype=DTYPE)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=ones,
            qkv=random_matrix(q_size + 2 * kv_size, hidden),
            qkv_bias=torch.zeros(q_size + 2 * kv_size, dtype=DTYPE) if spec.qkv_bias else None,
            q_norm=None,
            k_norm=None,
            o=random_matrix(hidden, q_size),
            o_bias=None,
            mlp_norm=ones,
            gate_up=random_matrix(2 * inner, hidden),
            gate_up_bias=None,
            down=random_matrix(hidden, inner),
            down_bias=None,
        )

    embedding = random_matrix(spec.vocab_size, hidden)
    layers = tuple(layer() for _ in range(spec.num_layers))
    return Weights(embedding=embedding, layers=layers, norm=ones, head=embedding)


def llama_135m() -> ModelSpec:
    """SmolLM2-135M."""
    return ModelSpec(
        architecture="llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=RopeSpec(),
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * 30,
        eos_token_ids=(0,),
        dtype="bfloat16",
    )


def measure(threads: int) -> Iterator[Line]:
    one, all_threads = measure_machine(1), measure_machine(threads)
    for machine in dict.fromkeys((one, all_threads)):
        print(
            f"{machine.threads} threads: reads {machine.bytes_per_s / 1e9:.1f} GB/s, "
            f"multiplies {machine.flops_per_s / 1e9:.0f} GFLOP/s",
            flush=True,
        )
    spec = llama_135m()
    torch.set_num_threads(1)
    yield from measure_rows(one, spec.hidden_size, spec.intermediate_size)
    yield from measure_attention(one, spec.num_heads // spec.num_kv_heads, spec.head_dim)
    for scheme in (None, *SCHEMES):
        for columns, depth in ((3_072, 576), (576, 1_536), (49_152, 576)):
            yield from measure_linear(all_threads, columns, depth, scheme)
    for scheme in (None, *SCHEMES):
        yield from measure_steps(all_threads, spec, scheme)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    lines: list[Line] = []
    print(f"{'kernel':48} {'ms':>9} {'floor':>9} {'share':>6}  bound     GB/s  GFLOP/s")
    for one in measure(arguments.threads):
        lines.append(one)
        print(
            f"{one.kernel:48} {one.ms:9.3f} {one.floor_ms:9.3f} {one.share:6.0%}  {one.bound:7} "
            f"{one.gb_per_s:6.1f} {one.gflop_per_s:8.1f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in lines], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
