"""The tensors of a checkpoint directory, by name, over one or many safetensors files.

Used by `common.model.weights` alone. Every way in which files can be wrong ends in a ModelError
of one line that names the file or the tensor.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from common.errors import ModelError
from common.shards import shard_paths

DISK_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


class _TensorFile(Protocol):
    """What is used of an open safetensors file, which has no types of its own."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


class Checkpoint:
    """Open safetensors files; a context manager. Opening reads the headers only."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if there are no safetensors, or a file is missing or corrupt."""
        self._stack = ExitStack()
        self._files: dict[str, _TensorFile] = {}
        """Tensor name -> the open file that holds it."""
        self._directory = directory
        try:
            for path in shard_paths(directory):
                file = self._open(path)
                for name in file.keys():
                    self._files[name] = file
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor on the CPU, in the dtype that it has on disk. Raises ModelError if it is
        missing, has another shape, or a dtype other than bf16, fp16 and fp32."""
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"checkpoint {self._directory} has no tensor {name}")
        try:
            tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"cannot read tensor {name}: {_one_line(error)}") from None
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"tensor {name} has shape {list(tensor.shape)}, but config.json makes it "
                f"{list(shape)}"
            )
        if tensor.dtype not in DISK_DTYPES:
            raise ModelError(
                f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; supported weights: "
                "bfloat16, float16, float32"
            )
        return tensor

    def _open(self, path: Path) -> _TensorFile:
        try:
            file: _TensorFile = self._stack.enter_context(safe_open(path, framework="pt"))
            return file
        except FileNotFoundError:
            raise ModelError(f"checkpoint file {path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"checkpoint file {path} is corrupt or truncated: {_one_line(error)}"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
