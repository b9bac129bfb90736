import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.model.spec import load_spec
from common.model.weights import Weights, load_weights
from tests.checkpoints import ARCHITECTURES, Architecture
from tests.conftest import MakeCheckpoint

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(directory, load_spec(directory), dtype, CPU)


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))


def rewrite(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a single-file checkpoint, or drop those that are None."""
    path = directory / "model.safetensors"
    held = load_file(path)
    for name, tensor in tensors.items():
        held.pop(name)
        if tensor is not None:
            held[name] = tensor
    save_file(held, path)


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(directory)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(directory), "DIR")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_where_it_belongs(
    checkpoint: MakeCheckpoint, architecture: Architecture
) -> None:
    directory = checkpoint(architecture, bias=architecture in ("llama", "qwen3"))
    left = load_file(directory / "model.safetensors")
    weights = load(directory)

    def equals(tensor: torch.Tensor | None, *names: str) -> None:
        parts = [left.pop(name) for name in names if name in left]
        assert (tensor is None) == (not parts)
        assert tensor is None or torch.equal(tensor, torch.cat(parts))

    equals(weights.embedding, "model.embed_tokens.weight")
    equals(weights.norm, "model.norm.weight")
    equals(weights.head, "lm_head.weight")
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}"
        qkv = [f"{at}.self_attn.{p}_proj" for p in "qkv"]
        gate_up = [f"{at}.mlp.{p}_proj" for p in ("gate", "up")]
        equals(layer.input_norm, f"{at}.input_layernorm.weight")
        equals(layer.qkv, *(f"{name}.weight" for name in qkv))
        equals(layer.qkv_bias, *(f"{name}.bias" for name in qkv))
        equals(layer.q_norm, f"{at}.self_attn.q_norm.weight")
        equals(layer.k_norm, f"{at}.self_attn.k_norm.weight")
        equals(layer.o, f"{at}.self_attn.o_proj.weight")
        equals(layer.o_bias, f"{at}.self_attn.o_proj.bias")
        equals(layer.mlp_norm, f"{at}.post_attention_layernorm.weight")
        equals(layer.gate_up, *(f"{name}.weight" for name in gate_up))
        equals(layer.gate_up_bias, *(f"{name}.bias" for name in gate_up))
        equals(layer.down, f"{at}.mlp.down_proj.weight")
        equals(layer.down_bias, f"{at}.mlp.down_proj.bias")
    assert not left


def test_a_tied_head_is_the_embedding(checkpoint: MakeCheckpoint) -> None:
    weights = load(checkpoint("qwen2", tied=True))
    assert weights.head is weights.embedding


def test_shards_hold_what_one_file_holds(checkpoint: MakeCheckpoint) -> None:
    sharded = checkpoint("llama", shard_bytes=200_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    whole, parts = load(checkpoint("llama")), load(sharded)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(one.qkv, other.qkv) and torch.equal(one.down, other.down)
    assert torch.equal(whole.head, parts.head)


@pytest.mark.parametrize("disk", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(checkpoint: MakeCheckpoint, disk: str, wanted: torch.dtype) -> None:
    directory = checkpoint("mistral", dtype=disk)
    weights = load(directory, wanted)
    assert weights.dtype == wanted and weights.device == CPU
    held = load_file(directory / "model.safetensors")["lm_head.weight"]
    assert held.dtype == getattr(torch, disk)
    assert torch.equal(weights.head, held.to(wanted))


def test_no_progress_bar_without_a_terminal(
    checkpoint: MakeCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = checkpoint("llama")
    capfd.readouterr()
    load(directory)
    assert capfd.readouterr() == ("", "")


def test_missing_tensor(copy: Path) -> None:
    rewrite(copy, **{"model.layers.1.mlp.up_proj.weight": None})
    assert refusal(copy) == "checkpoint DIR has no tensor model.layers.1.mlp.up_proj.weight"


def test_wrong_shape(copy: Path) -> None:
    rewrite(copy, **{"model.norm.weight": torch.ones(63)})
    assert refusal(copy) == (
        "tensor model.norm.weight has shape [63], but config.json makes it [64]"
    )


def test_quantized_tensor(copy: Path) -> None:
    rewrite(copy, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    assert refusal(copy) == (
        "tensor model.norm.weight is int8; supported weights: bfloat16, float16, float32"
    )


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_truncated_file(copy: Path, size: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(copy).startswith(
        "checkpoint file DIR/model.safetensors is corrupt or truncated: "
    )


def test_file_that_is_no_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not what it should be" * 100)
    assert "DIR/model.safetensors is corrupt or truncated" in refusal(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    assert refusal(copy) == (
        "no safetensors weights in DIR (looked for model.safetensors and "
        "model.safetensors.index.json)"
    )


def test_missing_shard(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(checkpoint("llama", shard_bytes=200_000), directory)
    shard = min(directory.glob("model-*.safetensors"))
    shard.unlink()
    assert refusal(directory) == f"checkpoint file DIR/{shard.name} is missing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "DIR/model.safetensors.index.json is not a valid safetensors index: "),
        ("[]", "DIR/model.safetensors.index.json is not a valid safetensors index: "),
        ("{}", "DIR/model.safetensors.index.json is not a valid safetensors index: "),
        (
            json.dumps({"weight_map": {"x": "../model.safetensors"}}),
            "DIR/model.safetensors.index.json names '../model.safetensors', which is no",
        ),
        (
            json.dumps({"weight_map": {"x": 7}}),
            "DIR/model.safetensors.index.json names 7, which is no",
        ),
    ],
)
def test_broken_index(copy: Path, text: str, message: str) -> None:
    (copy / "model.safetensors.index.json").write_text(text)
    assert refusal(copy).startswith(message)
