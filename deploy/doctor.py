"""`tandem doctor`: what an operator needs to know of a machine, and of a deployment that runs.

Each finding is a line; one that failed says what to do. Exit code 1 if any failed.
"""

import asyncio
import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from common.config import TRANSPORTS, ExposureConfig, RedisConfig, flag
from common.errors import ConfigError
from common.kv.shared import SharedBlocks
from common.messages import WorkerInfo
from common.model.cpu.build import COMPILERS, CPU_INFO, BuildError, build
from common.redis_client import without_password
from deploy import doctor_links, resources
from deploy.port import reserved
from deploy.redis_server import check, find_binary
from kvtransfer.copying import library
from kvtransfer.ucx_transport import is_installed

OK, NOTE, FAILED = "ok", "note", "FAILED"
CPU_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")
LEAST_MEMORY: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(RedisConfig, ExposureConfig):
    """What is checked."""

    json: bool = flag(False, "write the findings as JSON")
    host: str = flag("127.0.0.1", "address that the router would bind")
    port: int = flag(8000, "port of the router; 0: any free one")
    worker_host: str = flag("127.0.0.1", "address that workers would bind")
    transport: str = flag("auto", "how KV blocks are to travel", choices=TRANSPORTS)


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: str
    """OK, NOTE (works, could be better) or FAILED."""
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.state:6} {self.name:12} {self.detail}{advice}"


# ------------------------------------------------------------ the machine


def _software() -> Iterator[Finding]:
    version = platform.python_version()
    is_new = sys.version_info >= (3, 11)
    yield Finding(
        "python", OK if is_new else FAILED, version, "" if is_new else "install 3.11 or newer"
    )
    try:
        yield Finding("torch", OK, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("torch", FAILED, "not installed", "pip install torch: workers need it")


def _processor() -> Iterator[Finding]:
    words = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
    found = [name for name in CPU_FLAGS if name in words]
    cores = f"{len(resources.available_cores())} cores, {', '.join(found) or 'no vector units'}"
    yield Finding("cpu", OK if "avx2" in found else NOTE, cores)
    gpus = resources.gpus()
    shown = ", ".join(f"{gpu.index} ({gpu.free_bytes >> 30} GiB free)" for gpu in gpus)
    yield Finding("gpu", OK if gpus else NOTE, shown or "none that this torch can use")
    try:
        build()
        kernels = "compiled for this CPU"
        yield Finding("compiler", OK, kernels)
    except (BuildError, OSError) as error:
        kernels = ""
        yield Finding("compiler", NOTE, str(error), f"install one of {', '.join(COMPILERS)}")
    backend = "triton" if gpus else "native" if kernels else "torch (slow)"
    yield Finding("backend", OK if gpus or kernels else NOTE, backend)
    if library() is None:
        yield Finding("copies", NOTE, "not native", f"install one of {', '.join(COMPILERS)}")


def _memory() -> Iterator[Finding]:
    free = resources.available_memory()
    yield Finding(
        "memory",
        OK if free >= LEAST_MEMORY else FAILED,
        f"{free / (1 << 30):.1f} GiB free",
        "" if free >= LEAST_MEMORY else "stop something: pools and weights need more",
    )
    try:
        SharedBlocks(1, 4096)
        yield Finding("shared", OK, "sealed memory can be made")
    except OSError as error:
        yield Finding("shared", NOTE, str(error), "blocks will travel over tcp on this machine too")
    modes = {}
    for name in ("enabled", "shmem_enabled"):
        file = PAGES / name
        text = file.read_text() if file.exists() else "[never]"
        modes[name] = text.partition("[")[2].partition("]")[0]
    is_huge = modes["enabled"] != "never" and modes["shmem_enabled"] not in ("never", "deny")
    yield Finding(
        "huge pages",
        OK if is_huge else NOTE,
        f"anonymous: {modes['enabled']}, shared: {modes['shmem_enabled']}",
        "" if is_huge else f"as root: echo advise > {PAGES / 'shmem_enabled'}",
    )


def _ports(config: DoctorConfig) -> Iterator[Finding]:
    for name, host, port in (
        ("router port", config.host, config.port),
        ("worker port", config.worker_host, 0),
    ):
        try:
            with reserved(host, port) as found:
                yield Finding(name, OK, f"{host}:{found} can be bound")
        except (ConfigError, OSError) as error:
            advice = f"give another --{'port' if name == 'router port' else 'worker-host'}"
            yield Finding(name, FAILED, str(error), advice)


# ------------------------------------------------------------ transfers, Redis, workers


def _transfers(config: DoctorConfig) -> Iterator[Finding]:
    if not is_installed():
        state = FAILED if config.transport == "ucx" else NOTE
        yield Finding("ucx", state, "ucxx is not installed", "pip install 'tandem[ucx]' for RDMA")
    for name in ("shm", "tcp", "zmq", *(["ucx"] if is_installed() else [])):
        try:
            rate = asyncio.run(doctor_links.measure(name, config.worker_host))
            yield Finding(f"over {name}", OK, f"{rate / 1e9:.2f} GB/s between two endpoints here")
        except (ConfigError, OSError, TimeoutError) as error:
            is_needed = config.transport == name or (config.transport == "auto" and name == "zmq")
            reason = str(error) or "nothing arrived"
            advice = "look at --worker-host and the firewall" if is_needed else "not used then"
            yield Finding(f"over {name}", FAILED if is_needed else NOTE, reason, advice)


def _deployment(config: DoctorConfig) -> Iterator[Finding]:
    if config.redis is None:
        try:
            yield Finding("redis", OK, f"no --redis; `tandem up` starts {find_binary()}")
        except ConfigError as error:
            yield Finding("redis", FAILED, str(error))
        return
    try:
        check(config.redis)
    except ConfigError as error:
        yield Finding("redis", FAILED, str(error), "start it, or correct --redis")
        return
    yield Finding("redis", OK, without_password(config.redis))
    workers, wrong = doctor_links.registered(config.redis, config.namespace)
    for text in wrong:
        yield Finding("worker", FAILED, text, "restart it with this version")
    if not workers:
        yield Finding("workers", NOTE, f"none in namespace {config.namespace!r}")
    for info in workers:
        name = f"{info.id} ({info.role})"
        try:
            rates = doctor_links.rates(info)
            yield Finding("worker", OK, f"{name} answers; measured: {rates or 'no transfers yet'}")
        except OSError as error:
            advice = f"is process {info.pid} alive, and {info.metrics_url} open to this machine?"
            yield Finding("worker", FAILED, f"{name}: {error}", advice)
    for sender in (info for info in workers if info.role == "prefill"):
        for receiver in (info for info in workers if info.role == "decode"):
            yield _pair(sender, receiver, config)


def _pair(sender: WorkerInfo, receiver: WorkerInfo, config: DoctorConfig) -> Finding:
    """Whether the first could send to the second, as tried from this machine."""
    name = f"{sender.id} -> {receiver.id}"
    if sender.content_id != receiver.content_id:
        return Finding("pair", NOTE, f"{name}: other weights, never paired")
    if receiver.curve_key:
        return Finding("pair", NOTE, f"{name}: takes allowed keys alone, not tried from here")
    try:
        ways = asyncio.run(doctor_links.reach(sender, receiver, config.worker_host))
    except (ConfigError, OSError, TimeoutError) as error:
        reason = str(error) or f"no answer from {receiver.kv_address}"
        return Finding("pair", FAILED, f"{name}: {reason}", "open the workers' ports to each other")
    works = [way for way, reason in ways.items() if not reason]
    wrong = "; ".join(reason for reason in ways.values() if reason)
    detail = f"{name}: {' or '.join(works) or 'no transport'} from here" + (
        f" ({wrong})" if wrong else ""
    )
    return Finding(
        "pair",
        OK if works else FAILED,
        detail,
        "" if works else "open the workers' ports to each other",
    )


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Every finding, as it is there."""
    yield from _software()
    yield from _processor()
    yield from _memory()
    yield from _ports(config)
    yield from _transfers(config)
    yield from _deployment(config)


def main(config: DoctorConfig) -> int:
    found: list[Finding] = []
    for finding in examine(config):
        found.append(finding)
        if not config.json:
            print(finding, flush=True)
    failed = sum(finding.state == FAILED for finding in found)
    if config.json:
        report: dict[str, object] = {"failed": failed}
        report["findings"] = [asdict(finding) for finding in found]
        print(msgspec.json.encode(report).decode())
    else:
        print(f"{failed} of {len(found)} failed" if failed else "nothing is in the way")
    return 1 if failed else 0
