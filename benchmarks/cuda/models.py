"""Random models of known shapes, end to end through `TritonDecoder`. Used by `benchmarks.gpu`.

No checkpoint and no tokenizer: weights are random, prompts are random tokens, and a step is what an
engine asks of the decoder, the copy of its inputs and the wait for its tokens included.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.cuda.measure import Machine
from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.rope_spec import RopeSpec
from common.model.spec import ModelSpec
from common.model.triton.decoder import TritonDecoder
from common.model.weights import LayerWeights, Weights

BLOCK: Final = 64
BATCHES: Final = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table of models."""

    model: str
    what: str
    tokens_per_s: float
    ms: float
    """Of one step, median."""
    share: float
    """Of the floor: MFU against the measured matrix rate, or of the measured bandwidth."""


def llama(name: str) -> ModelSpec:
    """`8B` and `1B` as Llama 3 has them, and `tiny` for a test on a CPU."""
    vocab, hidden, inner, layers, heads, kv_heads, dim, most = {
        "8B": (128_256, 4_096, 14_336, 32, 32, 8, 128, 16_384),
        "1B": (128_256, 2_048, 8_192, 16, 32, 8, 64, 16_384),
        "tiny": (96, 32, 64, 1, 4, 2, 16, 512),
    }[name]
    return ModelSpec(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=1e-5,
        rope=RopeSpec(theta=500_000.0),
        max_position_embeddings=most,
        tie_word_embeddings=name != "8B",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * layers,
        eos_token_ids=(),
        dtype="bfloat16",
    )


def random_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Weights:
    """The same numbers in every process with the same device."""
    generator = torch.Generator(device).manual_seed(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        target = torch.empty(rows, columns, dtype=dtype, device=device)
        return target.normal_(std=columns**-0.5, generator=generator)

    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ones = torch.ones(hidden, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=ones,
            qkv=matrix(q_size + 2 * kv_size, hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            o=matrix(hidden, q_size),
            o_bias=None,
            mlp_norm=ones,
            gate_up=matrix(2 * inner, hidden),
            gate_up_bias=None,
            down=matrix(hidden, inner),
            down_bias=None,
        )

    layers = tuple(layer() for _ in range(spec.num_layers))
    # Unit variance: attention must matter to the tokens that are compared.
    embedding = torch.empty(spec.vocab_size, hidden, dtype=dtype, device=device)
    embedding.normal_(generator=generator)
    head = embedding if spec.tie_word_embeddings else matrix(spec.vocab_size, hidden)
    return Weights(embedding=embedding, layers=layers, norm=ones, head=head)


class Model:
    """A random model with a pool whose slots hold random numbers."""

    def __init__(self, name: str, machine: Machine, num_blocks: int) -> None:
        self.name = name
        self.spec = llama(name)
        dtype = torch.bfloat16 if machine.cuda else torch.float32
        self.weights = random_weights(self.spec, machine.device, dtype)
        layout = self.spec.layout(BLOCK, str(dtype).split(".")[1])
        self.pool = KvPool(layout, num_blocks, machine.device)
        self.pool.tensor.normal_()
        self.decoder = TritonDecoder(self.spec, self.weights, self.pool)
        body = sum(
            matrix.numel()
            for layer in self.weights.layers
            for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        self.body, self.head = body, self.weights.head.numel()
        self.machine = machine

    def step(self, rows: Sequence[Row]) -> list[int]:
        """The best token of every row."""
        return self.decoder.compute(rows, range(len(rows)), [True] * len(rows))[0]

    def prefill_flops(self, start: int, count: int) -> float:
        """Of one chunk, logits of its last token included."""
        pairs = sum(range(start + 1, start + count + 1))
        attention = 4 * pairs * self.spec.num_heads * self.spec.head_dim * self.spec.num_layers
        return 2 * count * self.body + 2 * self.head + attention

    def decode_bytes(self, contexts: Sequence[int]) -> float:
        """The fewest bytes of a decode step: all weights once, the KV of all contexts."""
        each = self.weights.dtype.itemsize
        kv = self.pool.block_bytes // BLOCK
        return (self.body + self.head) * each + sum(contexts) * kv


def prompt_of(spec: ModelSpec, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(spec.vocab_size, (count,), generator=generator).tolist()
    return tokens


def measure_prefill(model: Model, count: int, repeats: int) -> Result:
    """One prompt of `count` tokens in one chunk."""
    tokens = prompt_of(model.spec, count, 0)
    blocks = list(range(-(-count // BLOCK)))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        model.step([Row(tokens, 0, blocks)])
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    share = model.prefill_flops(0, count) / seconds / model.machine.flops_per_s
    return Result(model.name, f"prefill {count}", count / seconds, seconds * 1e3, share)


def measure_decode(model: Model, batch: int, context: int, steps: int) -> Result:
    """`steps` steps of `batch` rows, each of which takes the token of the step before."""
    per_row = -(-(context + steps + 2) // BLOCK)
    tables = [list(range(i * per_row, (i + 1) * per_row)) for i in range(batch)]
    assert batch * per_row <= model.pool.num_blocks, (batch, per_row)
    tokens = prompt_of(model.spec, batch, 1)
    times = []
    # The first two steps run eagerly, capture the graph, and replay it for the first time.
    for position in range(context, context + steps + 2):
        rows = [Row([t], position, table) for t, table in zip(tokens, tables, strict=True)]
        began = time.perf_counter()
        tokens = model.step(rows)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    floor = model.decode_bytes([context + steps // 2] * batch) / model.machine.bytes_per_s
    return Result(
        model.name,
        f"decode, batch {batch}, context {context}",
        batch / seconds,
        seconds * 1e3,
        floor / seconds,
    )


def measure_mixed(model: Model, batch: int, context: int, chunk: int, chunks: int) -> list[Result]:
    """Colocated: decode rows in one step with chunks of a long prompt, and without them."""
    per_row = -(-(context + 2 * chunks + 4) // BLOCK)
    tables = [list(range(i * per_row, (i + 1) * per_row)) for i in range(batch)]
    long_blocks = list(range(batch * per_row, batch * per_row + -(-chunk * chunks // BLOCK)))
    prompt = prompt_of(model.spec, chunk * chunks, 2)
    tokens = prompt_of(model.spec, batch, 1)
    times = []
    for index in range(chunks + 1):
        position = context + index
        rows = [Row([t], position, table) for t, table in zip(tokens, tables, strict=True)]
        part = max(0, index - 1) * chunk
        rows.append(Row(prompt[part : part + chunk], part, long_blocks))
        began = time.perf_counter()
        tokens = model.step(rows)[:batch]
        times.append(time.perf_counter() - began)
    times = times[1:]
    seconds = statistics.median(times)
    floor = model.prefill_flops(0, chunk * chunks) / model.machine.flops_per_s
    return [
        Result(
            model.name,
            f"colocated: {batch} rows with chunks of {chunk}, prompt tokens",
            chunk * chunks / sum(times),
            seconds * 1e3,
            floor / sum(times),
        )
    ]
