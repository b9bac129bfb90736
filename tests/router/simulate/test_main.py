"""The command `tandem simulate`."""

import importlib.util
import json
from pathlib import Path

import pytest

from deploy.cli import main

LOAD = "synthetic:requests=80,rate=6"
ARGUMENTS = [
    "simulate", "--trace", LOAD, "--prefill", "2", "--decode", "1", "--rate-scale", "2",
    "--slo-ttft", "2s+1.5x", "--slo-tpot", "50ms", "--seed", "3",
]  # fmt: skip


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "out.json", tmp_path / "model.json"
    model.write_text('{"prefill_blocks": 100}')
    given = ["--policy", "tandem", "--model-json", str(model), "--json", str(out)]
    assert main([*ARGUMENTS, *given]) == 0
    result = json.loads(out.read_text())
    assert {"rate", "attainment", "g90", "g99", "ttft_p50", "ttft_p99", "hit"} <= result.keys()
    assert result["requests"] == 80 and result["attainment"] == 1.0
    assert result["g90"] is None and result["g99"] is None
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["policy", "rate"]


def test_several_policies_searched(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--policy", "tandem,sticky", "--search", "--part", "0:0.5", "--json", "-"]
    assert main([*ARGUMENTS, *given]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["policy"] for result in results] == ["tandem", "sticky"]
    assert all(result["g90"] >= result["g99"] > 0 for result in results)
    assert all(result["requests"] == 40 for result in results)


def test_without_prefill_workers_the_others_prefill_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*ARGUMENTS, "--prefill", "0", "--policy", "tandem,sticky", "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(result["local"], result["attainment"]) for result in results] == [(1.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "--policy: 'best' is none of tandem, random"),
        (["--prefill", "-1"], "--prefill must not be negative"),
        (["--decode", "0"], "--decode at least 1"),
        (["--prefill", "0", "--policy", "pooled"], "--policy pooled needs --prefill"),
        (["--rate-scale", "0"], "--rate-scale must be positive"),
        (["--warm-up", "1"], "--warm-up must be at least 0 and below 1"),
        (["--part", "1:0"], "--part: '1:0' is no part"),
        (["--trace", "none.jsonl"], "none.jsonl"),
        (["--slo-ttft", "soon"], "--slo-ttft: 'soon'"),
        (["--fail", "p9@1"], "there is no worker p9"),
        (["--json", "/dev/null/x"], "--json: "),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate"]) == 2
    assert "--trace is missing" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is here")
def test_plots_without_matplotlib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--plots", str(tmp_path)]) == 1
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plots(tmp_path: Path) -> None:
    assert main([*ARGUMENTS, "--plots", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ttft.png", "goodput.png"}
