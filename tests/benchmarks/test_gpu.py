"""`benchmarks.gpu` on a CPU, in the interpreter, with nothing installed but torch and triton."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = """
import runpy, sys
for name in ("zmq", "msgspec", "redis", "fastapi", "uvicorn", "pydantic", "aiohttp", "orjson"):
    sys.modules[name] = None  # an import of it fails
sys.argv = ["benchmarks.gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


@pytest.mark.parametrize("part", ["checks", "pair"])
def test_parts_run_without_what_a_server_needs(tmp_path: Path, part: str) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, "-c", BLOCKED, "--self-test", "--part", part, "--json", str(results)]
    done = subprocess.run(command, cwd=ROOT, timeout=200, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    written = json.loads(results.read_text())
    if part == "checks":
        checks = written["checks"]
        assert len(checks) >= 25 and all(check["passed"] for check in checks)
        return
    assert [line["model"] for line in written["models"]] == ["tiny", "tiny"]
    notes = "\n".join(written["notes"])
    assert "zmq and msgspec missing" in notes, "what was not done is said"
    assert "tokens from shipped KV are equal to those computed here" in notes
