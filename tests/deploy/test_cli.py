"""The `tandem` command: help, exit codes, and one clear line for everything that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tandem(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **variables},
        check=False,
        timeout=60,
    )


def test_help_lists_the_commands() -> None:
    result = tandem("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("up", "router", "prefill", "decode", "version"):
        assert f"\n  {command} " in result.stdout


def test_no_command_is_wrong_usage() -> None:
    assert tandem().returncode == 2


@pytest.mark.parametrize("command", ["up", "router", "prefill", "decode"])
def test_help_of_a_command(command: str) -> None:
    result = tandem(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: tandem {command} [flags]\n")
    assert "[TANDEM_MODEL]" in result.stdout


def test_version() -> None:
    result = tandem("version")
    assert result.returncode == 0
    assert result.stdout.startswith("tandem 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["sideways"], 2, "tandem: error: unknown command 'sideways' (see tandem --help)"),
        (["up", "--port", "x"], 2, "tandem up: error: --port: 'x' is not a whole number"),
        (
            ["up", "--decode", "0"], 2,
            "tandem up: error: --prefill must be at least 0 and --decode at least 1",
        ),
        (["up", "--port", "0", "--model", "/no/model"], 1,
         "tandem up: error: no checkpoint directory '/no/model'"),
        (["up", "--port", "0", "--pin-cores", "x"], 2,
         "tandem up: error: --pin-cores: 'x' is not a list of cores such as 0,2-4"),
        (["up", "--port", "0", "--device", "tpu"], 2,
         "tandem up: error: --device: 'tpu' is not auto, cpu, cuda or a list such as cuda:0,1"),
        (["up", "--api-key", ""], 2,
         "tandem up: error: --api-key must not be empty, nor begin or end with a blank"),
        (["decode"], 2, "tandem decode: error: --model is missing"),
        (["router", "--model", "x"], 2, "tandem router: error: --redis is missing"),
        (
            ["prefill", "--model", "x", "--redis", "redis://127.0.0.1:1/0"], 1,
            "tandem prefill: error: no Redis answers at redis://127.0.0.1:1/0: "
            "Error 111 connecting to 127.0.0.1:1. Connection refused",
        ),
    ],
)  # fmt: skip
def test_one_line_and_a_code(arguments: list[str], code: int, line: str) -> None:
    result = tandem(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.stderr


def test_a_model_that_cannot_be_served_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    result = tandem("up", "--port", "0", "--model", str(tmp_path))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("tandem up: error: ")
    assert "LlamaForCausalLM" in line


def test_variables_configure_like_flags() -> None:
    result = tandem("up", TANDEM_REDIS="redis://127.0.0.1:1/0", TANDEM_PORT="0")
    assert (result.returncode, result.stdout) == (1, "")
    assert "redis://127.0.0.1:1/0" in result.stderr
