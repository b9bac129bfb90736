from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from common.model.rope import Rotary, apply_rotary
from common.model.rope_spec import read_rope

CPU = torch.device("cpu")
HEAD_DIM = 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with a given scale": {**YARN, "attention_factor": 1.3},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn with betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_exactly_that_of_transformers(
    kind: str, theta: float, dtype: torch.dtype
) -> None:
    parameters = {**KINDS[kind], "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters=dict(parameters),
    )
    positions = torch.tensor([0, 1, 15, 16, 511, 512, 2047])
    heads = torch.randn(7, 6, HEAD_DIM, generator=torch.Generator().manual_seed(3)).to(dtype)

    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(
        heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin
    )

    rotary = Rotary(read_rope({"rope_parameters": parameters}, 2048), HEAD_DIM, CPU)
    apply_rotary(heads, *rotary.tables(positions, dtype))
    assert torch.equal(heads, expected[0].transpose(0, 1))
