"""The compiled CPU kernels: which sources they are made of. Used by `common.model.cpu.library`."""

from pathlib import Path
from typing import Final

from common.native import COMPILERS, CPU_INFO, NATIVE, BuildError
from common.native import build as build_library

__all__ = ["COMPILERS", "CPU_INFO", "NATIVE", "BuildError", "build"]

SOURCES: Final = Path(__file__).parent


def build(cache: Path | None = None, target: str = NATIVE) -> Path:
    """The library, from the cache if it is there; see `common.native.build`. Raises BuildError."""
    headers = list(SOURCES.glob("*.h"))
    return build_library("the CPU kernels", SOURCES / "library.cpp", headers, cache, target)
