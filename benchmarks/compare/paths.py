"""Where the comparison keeps what it makes: below `.cache/`, which git ignores."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
CHECKPOINTS = CACHE / "checkpoints"
VENVS = CACHE / "venvs"
LOGS = CACHE / "compare-logs"
RESULTS = ROOT / "benchmarks" / "results"
