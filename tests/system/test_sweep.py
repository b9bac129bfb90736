"""`tandem bench sweep` starts its topologies, measures them in turns and leaves nothing."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import MakeCheckpoint

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]


def test_topologies_in_turns(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = checkpoint("llama")
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "bench", "sweep", "--model", str(model),
         "--topologies", "colocated,1p1d", "--rates", "10", "--repeats", "1", "--point-seconds",
         "0.5", "--min-prompts", "5", "--random-input-len", "40", "--random-output-len", "4",
         "--slo", "ttft:60s,tpot:30s", "--up-flags", "--dtype float32 --kv-memory 64M",
         "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert [p["contender"] for p in document["points"]] == ["colocated", "1P1D"]
    for point in document["points"]:
        figures = point["figures"]
        assert (figures["completed"], figures["errors"], figures["rejected"]) == (5, 0, 0)
        assert figures["slo_attainment"] == 1.0
    assert document["advice"][0].startswith("Best for TTFT \u2264 60000 ms")
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"colocated.log", "1p1d.log"}
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(model) in line]
