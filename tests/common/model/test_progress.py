import os

import pytest

from common.model.progress import CLEAR_LINE, ProgressBar


def test_a_terminal_sees_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with ProgressBar("loading x", 3) as bar:
            bar.advance()
            bar.advance()
        seen = b""
        while seen.count(CLEAR_LINE.encode()) < 4:  # a terminal hands on what it gets in pieces
            seen += screen.read(4096)
        assert seen.decode().split(CLEAR_LINE) == [
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
