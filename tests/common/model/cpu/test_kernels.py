"""Every CPU kernel against float64 on odd sizes, for every instruction set that this CPU has."""

import ctypes
import shutil
from random import Random

import pytest
import torch

from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.model.cpu import kernels, library
from common.model.cpu.build import COMPILERS, CPU_INFO, NATIVE
from common.model.quantize import SCHEMES, product, quantize

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler"
)

TARGETS = {
    NATIVE: "",
    "-march=x86-64-v4": "avx512vl",
    "-march=x86-64-v3": "fma",
    "-march=x86-64": "sse2",
}
"""The compiler's flag, and a CPU flag without which the result would not run."""
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=TARGETS)
def native(request: pytest.FixtureRequest) -> ctypes.CDLL:
    needed = TARGETS[request.param]
    if needed and needed not in CPU_INFO.read_text().split():
        pytest.skip(f"this CPU has no {needed}")
    return library.load(None, request.param)


def tolerance(dtype: torch.dtype) -> float:
    """Of results of unit size: rounding of sums, and for bfloat16 of operands made on the way."""
    return 1e-2 if dtype == torch.bfloat16 else 2e-6


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 33, 200])
@pytest.mark.parametrize("depth", [1, 7, 64, 300])
def test_linear(native: ctypes.CDLL, dtype: torch.dtype, columns: int, depth: int) -> None:
    weight = randn(columns, depth).to(dtype)
    linear = kernels.Linear(native, weight, threads=2)
    for rows in (1, 2, 5, 11, 12, 13, 37):
        a = randn(rows, depth, seed=rows).to(dtype)
        result = linear.apply(kernels.padded(a), linear.output(rows))
        expected = a.double() @ weight.double().T
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=2e-6 * depth**0.5)


def test_rows_of_a_linear_do_not_depend_on_each_other(native: ctypes.CDLL) -> None:
    linear = kernels.Linear(native, randn(70, 90).bfloat16())
    a = kernels.padded(randn(33, 90).bfloat16())
    together = linear.apply(a, linear.output(33))
    for row in range(33):
        alone = linear.apply(a[row : row + 1].contiguous(), linear.output(1))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (31, 7), (33, 300), (70, 128)])
def test_quantized_linear(
    native: ctypes.CDLL, dtype: torch.dtype, name: str, columns: int, depth: int
) -> None:
    """Whole numbers are exact; what differs is the rounding of a few float32 operations."""
    matrix = quantize(randn(columns, depth).to(dtype), SCHEMES[name])
    linear = kernels.Linear(native, matrix, threads=2)
    for rows in (1, 2, 7, 13, 37):
        a = randn(rows, depth, seed=rows).to(dtype)
        a[0, -1] = 0
        result = linear.apply(kernels.padded(a), linear.output(rows))
        expected = product(a.float(), matrix)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6 * depth**0.5)
        for row in range(rows):
            alone = linear.apply(kernels.padded(a[row : row + 1]), linear.output(1))
            assert torch.equal(alone[0], result[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 256])
@pytest.mark.parametrize(("group", "window"), [(1, None), (3, 20), (8, 200)])
def test_attention(
    native: ctypes.CDLL, dtype: torch.dtype, head_dim: int, group: int, window: int | None
) -> None:
    """Over a pool whose other slots are NaN."""
    layer, kv_head, block_size = 1, 1, 16
    layout = KvLayout(2, 2, head_dim, block_size, str(dtype).removeprefix("torch."))
    for start, count in ((0, 1), (0, 33), (15, 2), (127, 1), (128, 3), (250, 70)):
        end = start + count
        pool = KvPool(layout, 40, poison=True)
        order = list(range(40))
        Random(end).shuffle(order)
        blocks = torch.tensor(order[: layout.blocks_for(end)], dtype=torch.int32)
        keys, values = randn(2, end, head_dim, seed=end).to(dtype)
        for position in range(end):
            block, slot = int(blocks[position // block_size]), position % block_size
            pool.tensor[block, layer, 0, kv_head, slot] = keys[position]
            pool.tensor[block, layer, 1, kv_head, slot] = values[position]
        queries = randn(count, group, head_dim, seed=count).to(dtype)
        attention = kernels.Attention(native, pool.tensor, group)
        result = attention.apply(
            queries, blocks, layer=layer, kv_head=kv_head, start=start, window=window
        )
        scores = torch.einsum("tgd,cd->gtc", queries.double(), keys.double()) * head_dim**-0.5
        age = torch.arange(start, end)[:, None] - torch.arange(end)
        hidden = (age < 0) | (age >= (window or end))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = torch.einsum("gtc,cd->tgd", weights, values.double())
        limit = 2 * tolerance(dtype)
        torch.testing.assert_close(result.double(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 30, 576])
def test_rms_norm(native: ctypes.CDLL, dtype: torch.dtype, columns: int) -> None:
    x, weight = 3 * randn(5, columns), randn(columns, seed=1)
    result = kernels.rms_norm(native, x, weight, 1e-5, dtype)
    wide = x.double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(result.double(), expected, rtol=tolerance(dtype), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 24, 64, 80, 256])
def test_rotation(native: ctypes.CDLL, dtype: torch.dtype, head_dim: int) -> None:
    heads, angles = randn(3, head_dim), randn(head_dim // 2, seed=1)
    result = kernels.rotate(native, heads, angles.cos(), angles.sin(), dtype)
    one, two = heads.double().chunk(2, dim=1)
    cos, sin = angles.double().cos(), angles.double().sin()
    expected = torch.cat((one * cos - two * sin, two * cos + one * sin), dim=1)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance(dtype), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(native: ctypes.CDLL, dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-30, 30, 997), torch.tensor([-1e4, 0, 1e4])))[: 62 * 16]
    extremes = torch.tensor([-1e30, -200, -90, -88, 0, 1e-30, 88, 90, 200, 1e30, 1, 2, 3, 4, 5, 6])
    for values in (gate, extremes):
        up = randn(len(values))
        result = kernels.swiglu(native, values, up, dtype)
        expected = torch.nn.functional.silu(values.double()) * up.double()
        torch.testing.assert_close(result.double(), expected, rtol=tolerance(dtype), atol=1e-9)


def test_reading(native: ctypes.CDLL) -> None:
    assert kernels.read(native, torch.arange(256.0), 2) == 255 * 128
