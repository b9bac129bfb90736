"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share, as functions over flat tokens.

Called by the runner once per step. Arithmetic follows transformers operation by operation
(float32 inside the norms, dtype of the model elsewhere), so that float32 tokens are equal and
bfloat16 logits differ by rounding alone.
"""

import torch
from torch.nn.functional import embedding, silu

from common.model.attention import LayerPool, attend
from common.model.attention_plan import AttentionPlan, Window
from common.model.quantize import product
from common.model.rope import apply_rotary
from common.model.spec import ModelSpec
from common.model.weights import LayerWeights, Weights


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension; normalised in float32, scaled in the dtype of `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def forward(
    spec: ModelSpec,
    weights: Weights,
    layer_pools: tuple[LayerPool, ...],
    plan: AttentionPlan,
    rotary: tuple[torch.Tensor, torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Hidden states [tokens, hidden] after the last layer, before the final norm.

    tokens: [tokens] int64. rotary: cos and signed sin, [tokens, 1, head_dim]. The KV of all
    tokens is in the pool afterwards.
    """
    x = embedding(tokens, weights.embedding)
    for layer, pool, window in zip(weights.layers, layer_pools, spec.windows, strict=True):
        x = x + _attention(spec, layer, pool, plan, rotary, window, x)
        x = x + _mlp(spec, layer, x)
    return x


def logits(spec: ModelSpec, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """[n, hidden] to [n, vocab] float32."""
    return product(
        rms_norm(hidden, weights.norm, spec.rms_norm_eps), weights.quantized_head or weights.head
    ).float()


def _attention(
    spec: ModelSpec,
    layer: LayerWeights,
    pool: LayerPool,
    plan: AttentionPlan,
    rotary: tuple[torch.Tensor, torch.Tensor],
    window: Window,
    x: torch.Tensor,
) -> torch.Tensor:
    h = rms_norm(x, layer.input_norm, spec.rms_norm_eps)
    heads = product(h, layer.matrix("qkv"), layer.qkv_bias).view(len(x), -1, spec.head_dim)
    rotated = spec.num_heads + spec.num_kv_heads
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k, v = heads.tensor_split((spec.num_heads, rotated), dim=1)
        q = rms_norm(q, layer.q_norm, spec.rms_norm_eps)
        k = rms_norm(k, layer.k_norm, spec.rms_norm_eps)
        heads = torch.cat((q, k, v), dim=1)
    apply_rotary(heads[:, :rotated], *rotary)
    return product(attend(heads, pool, plan, window), layer.matrix("o"), layer.o_bias)


def _mlp(spec: ModelSpec, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    h = rms_norm(x, layer.mlp_norm, spec.rms_norm_eps)
    gate, up = product(h, layer.matrix("gate_up"), layer.gate_up_bias).chunk(2, dim=-1)
    return product(silu(gate) * up, layer.matrix("down"), layer.down_bias)
