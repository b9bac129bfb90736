import os

import pytest

from common.model.progress import ProgressBar


def test_a_terminal_sees_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with ProgressBar("loading x", 3) as bar:
            bar.advance()
            bar.advance()
        assert screen.read(4096).decode().split("\r\x1b[K") == [
            "",
            f"loading x [{'.' * 30}] 0%",
            f"loading x [{'#' * 10}{'.' * 20}] 33%",
            f"loading x [{'#' * 20}{'.' * 10}] 66%",
            "",
        ]


def test_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("loading x", 1) as bar:
        bar.advance()
    assert capfd.readouterr() == ("", "")
