"""The safetensors files of a checkpoint: which they are, and what their headers say.

Read by everyone who needs a checkpoint's weights or its identity. No torch in this module.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ModelError

SINGLE: Final = "model.safetensors"
SUFFIX: Final = ".safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: 8 bytes of header length, the header (JSON), the data."""

    path: Path
    header: bytes
    data_start: int
    """Offset of the data in the file."""
    data_bytes: int


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; an index, if there is one, decides.

    Raises ModelError, in one line, if there are none or the index is not valid. Files that an
    index names may still be missing.
    """
    index = directory / INDEX
    if not index.exists():
        single = directory / SINGLE
        if not single.exists():
            raise ModelError(
                f"no safetensors weights in {directory} (looked for {SINGLE} and {INDEX})"
            )
        return [single]
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index} is not a valid safetensors index: {_one_line(error)}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIX):
            raise ModelError(f"{index} names {name!r}, which is no safetensors file beside it")
    return [directory / name for name in sorted(names)]


def read_shard(path: Path) -> Shard:
    """Read the header of one file and check that its data is all there.

    Raises ModelError, in one line, if the file is missing, not safetensors or truncated.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(f"checkpoint file {path} is corrupt or truncated: no header")
            header = file.read(length)
    except FileNotFoundError:
        raise ModelError(f"checkpoint file {path} is missing") from None
    except OSError as error:
        raise ModelError(f"cannot read checkpoint file {path}: {error.strerror}") from None
    try:
        tensors = json.loads(header)
        ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
        expected = max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError(f"checkpoint file {path} is corrupt: its header is not valid") from None
    data_bytes = size - 8 - length
    if data_bytes != expected:
        raise ModelError(
            f"checkpoint file {path} is corrupt or truncated: {data_bytes:,} bytes of data, "
            f"its header says {expected!r}"
        )
    return Shard(path, header, 8 + length, data_bytes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
