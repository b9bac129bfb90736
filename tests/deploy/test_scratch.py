"""The private directory: removed at the end, or by the next deployment after a crash."""

import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deploy.scratch import scratch


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_private_and_removed(temporary: Path) -> None:
    with scratch() as directory:
        assert directory.parent == temporary
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "file").touch()
    assert list(temporary.iterdir()) == []


def test_the_directory_of_a_killed_process_is_removed_and_one_in_use_is_not(
    temporary: Path,
) -> None:
    program = (
        "import os, signal, sys, tempfile\n"
        "from deploy.scratch import scratch\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "with scratch() as directory:\n"
        "    (directory / 'file').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with scratch() as mine:
        subprocess.run([sys.executable, "-c", program, str(temporary)], check=False)
        assert len(list(temporary.iterdir())) == 2
        with scratch() as other:
            assert set(temporary.iterdir()) == {mine, other}
