"""The models of `benchmarks.kernels`: random weights of real shapes, and rows of their steps."""

from collections.abc import Iterator
from typing import Final

import torch

from common.model.batch import Row, Sample
from common.model.quantize import Matrix, QuantizedMatrix
from common.model.rope_spec import RopeSpec
from common.model.spec import ModelSpec
from common.model.weights import LayerWeights, Weights
from common.sampling import SamplingParams

DTYPE: Final = torch.bfloat16
BLOCK: Final = 16
GREEDY: Final = SamplingParams(max_tokens=2, temperature=0.0)


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
