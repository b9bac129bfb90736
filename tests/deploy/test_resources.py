"""Shares of memory, cores and GPUs."""

import os
from pathlib import Path

import pytest

from common.config import UpConfig
from common.errors import ConfigError, UsageError
from deploy import resources
from deploy.resources import MIB, Gpu, devices, pinned_cores, plan

GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores, 32 GiB free, no GPU."""
    monkeypatch.setattr(resources, "available_cores", lambda: list(range(8)))
    monkeypatch.setattr(resources, "available_memory", lambda: 32 * GIB)
    monkeypatch.setattr(resources, "gpus", list[Gpu])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """4 GiB of weights in two shards (holes, no disk)."""
    for shard in ("a", "b"):
        with (tmp_path / f"{shard}.safetensors").open("wb") as file:
            file.truncate(2 * GIB)
    return tmp_path


def test_half_of_what_the_weights_leave_free(machine: None, model: Path) -> None:
    shares = plan(UpConfig(prefill=2, decode=2, device="auto"), model)
    assert [(s.device, s.kv_memory, s.threads, s.cores) for s in shares] == [
        ("cpu", "2048M", 2, ())
    ] * 4


def test_given_memory_is_passed_on(machine: None, model: Path) -> None:
    assert [s.kv_memory for s in plan(UpConfig(kv_memory="1G"), model)] == ["1G", "1G"]


def test_a_little_is_always_given(machine: None, model: Path) -> None:
    shares = plan(UpConfig(prefill=8, decode=8), model)
    assert {s.kv_memory for s in shares} == {"64M"}
    assert {s.threads for s in shares} == {1}


def test_each_worker_its_own_cores(machine: None, model: Path) -> None:
    shares = plan(UpConfig(prefill=1, decode=2, pin_cores="auto"), model)
    assert [s.cores for s in shares] == [(0, 1), (2, 3), (4, 5)]
    assert {s.threads for s in shares} == {2}
    shares = plan(UpConfig(pin_cores="7,2"), model)
    assert [(s.cores, s.threads) for s in shares] == [((2,), 1), ((7,), 1)]


def test_too_few_cores_to_pin(machine: None, model: Path) -> None:
    message = r"^--pin-cores: 3 workers need a core each, there are 2$"
    with pytest.raises(ConfigError, match=message):
        plan(UpConfig(decode=2, pin_cores="0,1"), model)


def test_threads_are_the_share_of_the_cores_or_what_was_asked_for(
    machine: None, model: Path
) -> None:
    assert [share.threads for share in plan(UpConfig(), model)] == [4, 4]
    assert [share.threads for share in plan(UpConfig(threads=7), model)] == [7, 7]


@pytest.mark.parametrize(
    ("text", "cores"), [("auto", list(range(8))), ("3", [3]), ("0,2-4,2", [0, 2, 3, 4])]
)
def test_core_lists(machine: None, text: str, cores: list[int]) -> None:
    assert pinned_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "1-", "0;1", "8", "0-8"])
def test_wrong_core_lists(machine: None, text: str) -> None:
    with pytest.raises(UsageError, match=r"^--pin-cores: "):
        pinned_cores(text)


GPUS = [Gpu(0, 80 * GIB), Gpu(1, 40 * GIB)]


@pytest.mark.parametrize(
    ("text", "found", "result"),
    [
        ("auto", [], ["cpu"]),
        ("cpu", GPUS, ["cpu"]),
        ("auto", GPUS, ["cuda:0", "cuda:1"]),
        ("cuda", GPUS, ["cuda:0", "cuda:1"]),
        ("cuda:1", GPUS, ["cuda:1"]),
        ("cuda:1,0", GPUS, ["cuda:1", "cuda:0"]),
    ],
)
def test_devices(text: str, found: list[Gpu], result: list[str]) -> None:
    assert devices(text, found) == result


@pytest.mark.parametrize(
    ("text", "found", "message"),
    [
        ("gpu", GPUS, "--device: 'gpu' is not auto, cpu, cuda or a list such as cuda:0,1"),
        ("cuda:0,2", GPUS, "--device cuda:0,2: there is no GPU 2"),
        ("cuda", [], "--device cuda: no GPU that this installation of torch can use"),
    ],
)
def test_wrong_devices(text: str, found: list[Gpu], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        devices(text, found)
    assert str(error.value) == message


def test_workers_are_spread_over_gpus_and_share_their_memory(
    machine: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "gpus", lambda: GPUS)
    shares = plan(UpConfig(prefill=1, decode=2), model)
    assert [s.device for s in shares] == ["cuda:0", "cuda:1", "cuda:0"]
    two = int((80 - 2 * 4) * GIB * resources.GPU_FRACTION / 2) // MIB
    one = int((40 - 4) * GIB * resources.GPU_FRACTION) // MIB
    assert [s.kv_memory for s in shares] == [f"{two}M", f"{one}M", f"{two}M"]


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '12.8'", True),
        ("cuda = '12.1'", True),
        ("cuda: Optional[str] = None", False),
        ("hip = '6.0'", False),
    ],
)
def test_cuda_build_of_torch(line: str, cuda: bool) -> None:
    assert resources.names_cuda(f"debug = False\n{line}\nxpu = None\n") is cuda


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resources.gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, 81920\necho 1, 40960\n")
    program.chmod(0o755)
    assert resources.gpus() == GPUS


def test_this_machine() -> None:
    assert resources.available_memory() > 64 * MIB
    assert set(resources.available_cores()) == os.sched_getaffinity(0)


def test_memory_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.available_memory() > 64 * MIB
    (tmp_path / "memory.max").write_text("5000\n")
    assert resources.available_memory() == 4000
