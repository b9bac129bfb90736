"""Quantised matrices and models: how much they lose, and that both backends compute the same."""

import msgspec
import pytest
import torch

from common.errors import ConfigError
from common.identity import content_id
from common.model.load import open_model
from common.model.quantize import SCHEMES, product, quantize, round_activations
from common.model.weights import quantize_weights
from tests.common.model.drive import Driver, greedy_params, load, random_prompts, run_greedy
from tests.conftest import MakeCheckpoint

WEIGHT_LOSS = {"int8": 0.01, "int4": 0.12, "w8a8": 0.01}
"""Of a matrix of normal numbers, relative."""


@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix_loses_little(name: str) -> None:
    matrix = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    quantized = quantize(matrix, SCHEMES[name])
    rest = quantized.dequantize() - matrix
    assert (rest.norm() / matrix.norm()).item() < WEIGHT_LOSS[name]
    assert torch.equal(quantized.dequantize()[3], matrix[3])


def test_a_clipped_group_is_closer_than_an_unclipped_one() -> None:
    matrix = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    rounded = (matrix / (scale := matrix.abs().max() / 7)).round() * scale
    error = (quantize(matrix, SCHEMES["int4"]).dequantize() - matrix).norm()
    assert error < (rounded - matrix).norm()


def test_rounding_of_activations() -> None:
    x = torch.tensor([[0.0, 0.0], [-1.0, 0.3]])
    assert torch.equal(round_activations(x, 8)[0], x[0])
    assert round_activations(x, 8)[1].tolist() == pytest.approx([-1, 38 / 127])
    assert round_activations(x, 16)[1].tolist() == pytest.approx([-1, 0.3], abs=2e-5)
    matrix = quantize(torch.eye(2), SCHEMES["int8"])
    assert product(x, matrix, torch.ones(2))[1].tolist() == pytest.approx([0, 1.3], abs=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backends_agree(checkpoint: MakeCheckpoint, name: str, dtype: str) -> None:
    """Logits of a whole model, over a prompt in chunks and a decode step."""
    directory = checkpoint("qwen2", dtype=dtype)
    loaded = open_model(str(directory), None, dtype, "cpu", name)
    [prompt] = random_prompts([75], 512)
    tops = []
    for kernels in ("native", "torch"):
        driver = Driver(loaded, num_blocks=8, kernels=kernels)
        params = greedy_params(2)
        run = driver.start(prompt, msgspec.structs.replace(params, logprobs=512))
        driver.step([run], [40])
        driver.step([run], [35])
        assert run.results[0].logprob is not None
        tops.append(dict(run.results[0].logprob.top))
    difference = max(abs(tops[0][token] - tops[1][token]) for token in tops[0])
    # A value that falls between two whole numbers may go either way in w8a8.
    limit = {"bfloat16": 0.35, "float32": 0.15 if name == "w8a8" else 0.01}[dtype]
    assert difference < limit


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_do_not_depend_on_company(checkpoint: MakeCheckpoint, name: str) -> None:
    loaded = load(checkpoint("llama", dtype="bfloat16"), "bfloat16")
    quantized = type(loaded)(
        directory=loaded.directory,
        spec=loaded.spec,
        weights=quantize_weights(loaded.weights, SCHEMES[name]),
        dtype_name=loaded.dtype_name,
    )
    prompts = random_prompts([40, 7, 130, 16, 3, 64, 9, 22, 31, 50], 512)
    together = run_greedy(quantized, prompts, 6, kernels="native")
    assert together == [run_greedy(quantized, [one], 6, kernels="native")[0] for one in prompts]


def test_quantized_kv_has_a_name_of_its_own(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("llama")
    names = {content_id(directory, "bfloat16", name) for name in ("none", *SCHEMES)}
    assert len(names) == 1 + len(SCHEMES)
    with pytest.raises(ConfigError, match="--quantize int4 is for CPUs only"):
        open_model(str(directory), None, "bfloat16", "cuda", "int4")
