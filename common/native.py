"""Compiles C++ for the CPU at hand, once, and finds it again. No torch.

Called at the first start on a machine: by `common.model.cpu.build` for the kernels, by
`kvtransfer.copying` for copies. The result lies in the user's cache directory under a name that
says everything it depends on: sources, flags, compiler and CPU.
"""

import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

log = logging.getLogger("tandem.kernels")

COMPILERS: Final = ("c++", "g++", "clang++")
FLAGS: Final = (
    "-std=c++20",
    "-O3",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
)
NATIVE: Final = "-march=native"
CPU_INFO: Final = Path("/proc/cpuinfo")
LIMIT_S: Final = 300.0


class BuildError(Exception):
    """Nothing can be compiled here; the message says why, in one line."""


def build(
    what: str, main: Path, headers: Sequence[Path], cache: Path | None, target: str = NATIVE
) -> Path:
    """The shared library made of `main`, which includes `headers`, from the cache if it is there.

    what: its name in the log. cache: directory, made if missing; none: `~/.cache/tandem/kernels`.
    target: the compiler's flag for the instruction set. Raises BuildError.

    Workers that start at the same time may compile at the same time; each writes a file of its own
    and puts it in place whole.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)})")
    flags = (*FLAGS, target)
    directory = cache or Path.home() / ".cache" / "tandem" / "kernels"
    path = directory / f"{_fingerprint([main, *headers], compiler, flags)}.so"
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            built = Path(scratch) / path.name
            log.info("compiling %s for this machine (once) with %s", what, compiler)
            began = time.monotonic()
            _run([compiler, *flags, str(main), "-o", str(built)])
            built.replace(path)
    except OSError as error:
        raise BuildError(f"cannot write {directory}: {error.strerror}") from error
    log.info("compiled %s in %.1f s", path, time.monotonic() - began)
    return path


def _fingerprint(sources: Sequence[Path], compiler: str, flags: Sequence[str]) -> str:
    """A name for what the compiler would make of the sources on this CPU."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(f"{source.name}\0".encode() + source.read_bytes())
    parts = (_run([compiler, "--version"]), *flags, platform.machine(), _cpu_flags())
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:32]


def _cpu_flags() -> str:
    if not CPU_INFO.exists():
        return platform.processor()
    lines = CPU_INFO.read_text().splitlines()
    kept = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(sorted(set(kept)))


def _run(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line]
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else result.returncode}")
    return result.stdout
