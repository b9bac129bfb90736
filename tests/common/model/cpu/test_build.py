"""Compiling the kernels: the cache, several workers at once, and machines where it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.cpu.build import COMPILERS, BuildError, build
from common.model.decoder import open_decoder
from common.model.torch_decoder import TorchDecoder
from tests.common.model.drive import load
from tests.conftest import MakeCheckpoint

PROGRAM = """
import sys
from pathlib import Path
from common.model.cpu.build import build
print(build(Path(sys.argv[1])))
"""


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_workers_that_start_at_once_share_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {worker.communicate(timeout=200)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert paths == {str(path) for path in tmp_path.iterdir()} and len(paths) == 1
    [path] = map(Path, paths)
    before = path.stat().st_mtime_ns
    assert build(tmp_path) == path and path.stat().st_mtime_ns == before


def test_a_compiler_that_fails_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ntest "$1" = --version && exit 0\necho "x: error: no" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(BuildError, match=r"^\S+c\+\+ failed: x: error: no$"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_torch_computes(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = load(checkpoint("llama"))
    pool = KvPool(loaded.spec.layout(16, "float32"), 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        open_decoder(loaded.spec, loaded.weights, pool, "native", 1)
    decoder = open_decoder(loaded.spec, loaded.weights, pool, "auto", 1)
    assert isinstance(decoder, TorchDecoder)
    assert "using torch" in caplog.text and "no C++ compiler" in caplog.text
    best, logits = decoder.compute([Row([1, 2], 0, [0])], [0], [True])
    assert len(best) == 1 and len(logits) == 0
