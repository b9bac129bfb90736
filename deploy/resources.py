"""What this machine has, and each worker's share of it: memory, cores, GPUs. Used by `deploy.up`.

Reads files of the kernel and asks `nvidia-smi`; torch stays out of the supervisor.
"""

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from common.config import UpConfig
from common.errors import ConfigError, UsageError

MIB = 1 << 20
SMALLEST_POOL = 64 * MIB
CPU_FRACTION = 0.5
"""Part of the free memory that pools may take on CPU: the rest is for activations and files."""
GPU_FRACTION = 0.85
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker gets. An empty `cores` leaves it on all of them."""

    device: str
    kv_memory: str
    threads: int
    cores: tuple[int, ...] = ()


def available_memory() -> int:
    """Bytes that new processes can use: what is free, within the limit of our control group."""
    meminfo = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    assert match is not None, "no MemAvailable in /proc/meminfo"
    available = int(match[1]) * 1024
    limit, current = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(current.read_text()))
    return max(available, 0)


def available_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def pinned_cores(text: str) -> list[int]:
    """The cores that `--pin-cores` names: `auto` for all, or a list such as `0,2-4`.

    Raises UsageError for a text that is no list or names cores that cannot be used.
    """
    usable = available_cores()
    if text == "auto":
        return usable
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UsageError(f"--pin-cores: {text!r} is not a list of cores such as 0,2-4")
        cores.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    if wrong := sorted(set(cores) - set(usable)):
        raise UsageError(f"--pin-cores: core {wrong[0]} is not among the usable cores {usable}")
    return sorted(set(cores))


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    return names_cuda(Path(spec.submodule_search_locations[0], "version.py").read_text())


def names_cuda(version: str) -> bool:
    """Whether the text of torch's version file names a CUDA version."""
    return re.search(r"^cuda(?:: [^=]*)? = ['\"]", version, re.MULTILINE) is not None


def gpus() -> list[Gpu]:
    """The GPUs that workers can use; none where torch or the driver does not support them."""
    if not _torch_has_cuda():
        return []
    query = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(",") for line in result.stdout.splitlines() if line.strip())
    return [Gpu(int(index), int(free) * MIB) for index, free in rows]


def devices(text: str, found: list[Gpu]) -> list[str]:
    """The devices that `--device` names. Raises ConfigError if one of them is not there."""
    if text == "cpu" or (text == "auto" and not found):
        return ["cpu"]
    if text in ("auto", "cuda"):
        wanted = [gpu.index for gpu in found]
    elif re.fullmatch(r"cuda:\d+(,\d+)*", text):
        wanted = [int(index) for index in text.removeprefix("cuda:").split(",")]
    else:
        raise UsageError(f"--device: {text!r} is not auto, cpu, cuda or a list such as cuda:0,1")
    if not found:
        raise ConfigError(f"--device {text}: no GPU that this installation of torch can use")
    if missing := sorted(set(wanted) - {gpu.index for gpu in found}):
        raise ConfigError(f"--device {text}: there is no GPU {missing[0]}")
    return [f"cuda:{index}" for index in wanted]


def weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _pool_bytes(free: int, weights: int, workers: int, fraction: float) -> int:
    """One pool of `workers` that share `free` bytes and load `weights` bytes each."""
    return max(int((free - workers * weights) * fraction / workers), SMALLEST_POOL)


def plan(config: UpConfig, model: Path) -> list[Share]:
    """One share per worker, prefill workers first. Raises ConfigError."""
    workers = config.prefill + config.decode
    found = gpus() if config.device != "cpu" else []
    spread = devices(config.device, found)
    free = {f"cuda:{gpu.index}": gpu.free_bytes for gpu in found}
    weights = weights_bytes(model)

    cores: list[tuple[int, ...]] = [()] * workers
    threads = max(1, len(available_cores()) // workers)
    if config.pin_cores is not None:
        pinned = pinned_cores(config.pin_cores)
        threads = len(pinned) // workers
        if threads == 0:
            raise ConfigError(
                f"--pin-cores: {workers} workers need a core each, there are {len(pinned)}"
            )
        cores = [tuple(pinned[i * threads : (i + 1) * threads]) for i in range(workers)]

    shares: list[Share] = []
    for number in range(workers):
        device = spread[number % len(spread)]
        if config.kv_memory is not None:
            memory = config.kv_memory
        elif device == "cpu":
            pool = _pool_bytes(available_memory(), weights, workers, CPU_FRACTION)
            memory = f"{pool // MIB}M"
        else:
            sharing = len(range(number % len(spread), workers, len(spread)))
            pool = _pool_bytes(free[device], weights, sharing, GPU_FRACTION)
            memory = f"{pool // MIB}M"
        shares.append(Share(device, memory, config.threads or threads, cores[number]))
    return shares
