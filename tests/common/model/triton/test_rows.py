"""RMSNorm, SwiGLU, rotation with the store of KV, and the matrix product, against the reference."""

import pytest
import torch

from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model import llama
from common.model.rope import Rotary, apply_rotary
from common.model.rope_spec import RopeSpec
from common.model.triton.linear import linear
from common.model.triton.rope import Pages, rope_store
from common.model.triton.rows import add_rms_norm, rms_norm, swiglu
from common.model.triton.tuning import Shape

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = TOLERANCES[b.dtype]
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (3, 64), (5, 576), (2, 1030)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype, seed=1)
    weight = random(size, dtype=dtype, seed=2)
    close(rms_norm(x, weight, EPS), llama.rms_norm(x, weight, EPS))
    expected = residual + x
    result = add_rms_norm(x, residual, weight, EPS)
    close(residual, expected)
    close(result, llama.rms_norm(residual, weight, EPS))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (3, 100), (2, 1030)])
def test_swiglu(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    close(swiglu(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 40, 64), (33, 70, 100), (70, 33, 16)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(rows: int, columns: int, depth: int, has_bias: bool) -> None:
    x, weight = random(rows, depth), random(columns, depth, seed=1)
    bias = random(columns, seed=2) if has_bias else None
    result = linear(x, weight, bias, Shape(32, 32, 4, 1))
    torch.testing.assert_close(
        result, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4
    )
    # A row's bits do not depend on the other rows.
    assert torch.equal(linear(x[:1].contiguous(), weight, bias, Shape(32, 32, 4, 1)), result[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 80), (8, 1, 128), (1, 1, 256)]
)
@pytest.mark.parametrize("norm", [True, False])
def test_rope_and_store(
    heads: int, kv_heads: int, head_dim: int, norm: bool, dtype: torch.dtype
) -> None:
    tokens, layer, size = 5, 1, 16
    layout = KvLayout(2, kv_heads, head_dim, size, str(dtype).removeprefix("torch."))
    pool = KvPool(layout, 4)
    pool.tensor.fill_(7.0)
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.tensor([0, 15, 16, 3, 40], dtype=torch.int32)
    slots = torch.tensor([0, 31, 32, -1, 63], dtype=torch.int32)
    rotary = Rotary(RopeSpec(), head_dim, torch.device("cpu"))
    cos, sin = rotary.tables(torch.arange(64), dtype)
    half = head_dim // 2
    tables = cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()
    weights = (random(head_dim, dtype=dtype, seed=3), random(head_dim, dtype=dtype, seed=4))
    pages = Pages.of(pool.tensor, layer)
    q = rope_store(qkv, pages, slots, positions, tables, weights if norm else None, EPS)

    expected = qkv.view(tokens, -1, head_dim).clone()
    if norm:
        expected[:, :heads] = llama.rms_norm(expected[:, :heads], weights[0], EPS)
        part = slice(heads, heads + kv_heads)
        expected[:, part] = llama.rms_norm(expected[:, part], weights[1], EPS)
    apply_rotary(expected[:, : heads + kv_heads], *rotary.tables(positions, dtype))
    close(q, expected[:, :heads])
    kv = expected[:, heads:].view(tokens, 2, kv_heads, head_dim)
    wanted = torch.full_like(pool.tensor, 7.0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // size, layer, :, :, slot % size] = kv[token]
    close(pool.tensor, wanted)
