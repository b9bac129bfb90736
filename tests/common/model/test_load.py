from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, ModelError
from common.model.load import choose_dtype, open_model
from common.model.spec import load_spec
from tests.conftest import MakeCheckpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_open_model(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("qwen3")
    loaded = open_model(str(directory), None, "bfloat16", "cpu")
    assert loaded.directory == directory
    assert loaded.spec == load_spec(directory)
    assert loaded.dtype_name == "bfloat16"
    assert loaded.weights.dtype == torch.bfloat16
    assert loaded.weights.device == CPU


def test_dtypes_that_are_asked_for(checkpoint: MakeCheckpoint) -> None:
    spec = load_spec(checkpoint("llama"))
    for name in ("bfloat16", "float16", "float32"):
        assert choose_dtype(name, spec, CPU) == choose_dtype(name, spec, CUDA) == name
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of auto, bfloat16"):
        choose_dtype("int8", spec, CPU)


def test_automatic_dtype(checkpoint: MakeCheckpoint) -> None:
    narrow, half = (load_spec(checkpoint("llama", dtype=d)) for d in ("bfloat16", "float16"))
    fast = " avx512_bf16 " in Path("/proc/cpuinfo").read_text().replace("\n", " ")
    assert choose_dtype("auto", narrow, CPU) == ("bfloat16" if fast else "float32")
    assert choose_dtype("auto", half, CPU) == ("bfloat16" if fast else "float32")
    assert choose_dtype("auto", narrow, CUDA) == "bfloat16"
    assert choose_dtype("auto", half, CUDA) == "float16"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^no config\.json in "):
        open_model(str(tmp_path), None, "auto", "cpu")
