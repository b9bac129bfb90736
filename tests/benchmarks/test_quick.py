"""The regression guard: ratios in which more is better, and what is said about them."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import control, machine, quick

FIGURES = {"tandem": {"c1": 10.0, "8x32/64": 200.0, "pf": 1000.0}}
CONTROL = {"decode_ms": 40.0, "gemm_gflop_s": 538.0, "read_gb_s": 30.0}


def test_ratios_grow_with_speed() -> None:
    found = quick.ratios(FIGURES, CONTROL)
    assert found == {
        "tandem c1": 4.0,
        "tandem 8x32/64": 8.0,
        "tandem pf": pytest.approx(0.5),
    }
    slower = quick.ratios({"tandem": {"c1": 20.0, "8x32/64": 100.0, "pf": 500.0}}, CONTROL)
    assert all(slower[name] < value for name, value in found.items())


def test_report_marks_what_fell() -> None:
    today = {"a": 1.0, "b": 0.8, "c": 2.0}
    kept = {"a": 1.1, "b": 1.0}
    assert quick.report(today, kept).splitlines() == [
        "ratio to the control         today      kept    change",
        "a                            1.000     1.100       -9%",
        "b                            0.800     1.000      -20%  slower",
        "c                            2.000         -         -",
    ]
    assert quick.fell(today, kept)
    assert not quick.fell({"a": 1.0}, kept)


def test_kept_ratios_are_what_the_next_run_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"c1": 10.0, "8x32/64": 200.0, "pf": 1000.0}
    monkeypatch.setattr(quick, "KEPT", tmp_path / "results" / "quick.json")
    monkeypatch.setattr(quick, "control", lambda cores: CONTROL)
    monkeypatch.setattr(quick, "tandem", lambda topology, cores: figures)
    assert quick.main(["--keep"]) == 0
    kept = json.loads(quick.KEPT.read_text())
    assert kept["ratios"]["tandem-1p1d c1"] == 4.0
    assert {"date", "commit", "machine", "command"} <= set(kept)
    assert quick.main([]) == 0
    assert "+0%" in capsys.readouterr().out
    figures["c1"] = 20.0
    assert quick.main([]) == 1
    assert (
        "tandem c1                    2.000     4.000      -50%  slower" in capsys.readouterr().out
    )


def test_control_takes_the_fastest() -> None:
    waits = iter([0.05, 0.0, 0.05])
    assert control.best(lambda: time.sleep(next(waits)), 3) < 0.04


def test_provenance_names_machine_and_commit_but_no_directories() -> None:
    found = machine.provenance()
    assert set(found) == {"date", "commit", "machine", "versions", "command"}
    assert found["date"].endswith("+00:00")
    assert found["machine"]["cores"] >= 1
    assert " /" not in found["command"]
    assert 0.0 <= machine.busy_share(0.05) <= 1.0
