"""From a `--model` value to a model in memory: the one call that a worker makes at its start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from common.errors import ConfigError
from common.model.hub import resolve
from common.model.quantize import SCHEMES
from common.model.spec import ModelSpec, load_spec
from common.model.weights import Weights, load_weights

TORCH_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
CPU_INFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that is ready to run."""

    directory: Path
    spec: ModelSpec
    weights: Weights
    dtype_name: str
    """`bfloat16`, `float16` or `float32`: of the weights and of the KV."""


def open_model(
    model: str,
    revision: str | None,
    dtype: str,
    device: torch.device | str,
    quantization: str = "none",
) -> Loaded:
    """Find, check and load a model. `dtype` is a value of `--dtype`, `auto` included;
    `quantization` one of `--quantize`.

    Raises ModelError, in one line, if the model cannot be found, read or served.
    """
    directory = resolve(model, revision)
    spec = load_spec(directory)
    target = torch.device(device)
    name = choose_dtype(dtype, spec, target)
    if quantization != "none" and target.type != "cpu":
        raise ConfigError(f"--quantize {quantization} is for CPUs only")
    weights = load_weights(directory, spec, TORCH_DTYPES[name], target, SCHEMES.get(quantization))
    return Loaded(directory=directory, spec=spec, weights=weights, dtype_name=name)


def choose_dtype(name: str, spec: ModelSpec, device: torch.device) -> str:
    """The dtype to run in. `auto`: bfloat16 where the device has instructions for it, except
    that a float16 checkpoint stays float16 on CUDA; else float32."""
    if name != "auto":
        if name not in TORCH_DTYPES:
            raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(TORCH_DTYPES)}")
        return name
    if device.type == "cuda":
        return "float16" if spec.dtype == "float16" else "bfloat16"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    if not CPU_INFO.exists():
        return False
    for line in CPU_INFO.read_text().splitlines():
        if line.startswith("flags"):
            return "avx512_bf16" in line.split()
    return False
