"""`tandem bench serve` against a real deployment, every dataset."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeCheckpoint
from tests.deployment import Deployment
from tests.system.prompts import VOCAB
from tests.system.serving import deployment

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
FIGURES = ("mean", "median", "p90", "p99")
KEYS = {
    *(f"{figure}_{name}_ms" for figure in FIGURES for name in ("ttft", "tpot", "itl", "e2el")),
    "output_throughput", "request_throughput", "request_goodput", "completed", "errors", "rejected",
}  # fmt: skip


@pytest.fixture(scope="module")
def served(checkpoint: MakeCheckpoint) -> Iterator[Deployment]:
    with deployment(checkpoint("llama"), "--block-size", "16") as running:
        yield running


def bench(served: Deployment, *flags: str) -> dict[str, Any]:
    """The summary of one run, in which every request must succeed."""
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "bench", "serve", "--base-url", served.url,
         "--vocab-size", str(VOCAB), "--no-progress", "--json", "-", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert set(summary) >= KEYS
    assert all(isinstance(summary[key], (int, float)) for key in KEYS)
    assert (summary["errors"], summary["rejected"]) == (0, 0)
    return summary


def test_random(served: Deployment) -> None:
    summary = bench(
        served, "--num-prompts", "12", "--request-rate", "40", "--random-input-len", "100",
        "--random-output-len", "8", "--num-warmups", "2", "--slo", "ttft:60s,tpot:30s",
    )  # fmt: skip
    assert summary["completed"] == 12
    assert summary["total_input_tokens"] == 1200
    assert summary["total_output_tokens"] == 96
    assert summary["cached_tokens"] == 0, "a warm-up warmed the cache"
    assert summary["slo_attainment"] == 1.0


def test_prefix_repetition(served: Deployment) -> None:
    summary = bench(
        served, "--dataset-name", "prefix_repetition", "--num-prompts", "10",
        "--prefix-repetition-prefix-len", "128", "--prefix-repetition-suffix-len", "20",
        "--prefix-repetition-num-prefixes", "1", "--prefix-repetition-output-len", "4",
        "--max-concurrency", "1",
    )  # fmt: skip
    assert summary["completed"] == 10
    assert summary["cached_tokens"] == 9 * 128


def test_conversation(served: Deployment, tmp_path: Path) -> None:
    summary = bench(
        served, "--dataset-name", "conversation", "--num-prompts", "9", "--conversation-turns", "3",
        "--random-input-len", "40", "--random-output-len", "24", "--max-concurrency", "3",
    )  # fmt: skip
    assert summary["completed"] == 9
    assert not summary["answers_unknown"]
    # Turn 2 continues 64 tokens, turn 3 128. A prefill worker has computed their prompts: 40 and
    # 104 tokens in whole blocks of 16; the answers were written by the decode worker, which has all
    # but their last token, and from which they are fetched where that costs less.
    assert summary["cached_tokens"] in range(3 * (32 + 96), 3 * (48 + 112) + 1, 16)


def test_trace(served: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lengths = [1400 + 40 * i for i in range(8)]
    rows = [
        {"timestamp": 200 * i, "input_length": length, "output_length": 32 * (1 + i % 3),
         "hash_ids": [1, 2, 10 + i]}
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = bench(
        served, "--dataset-name", "trace", "--dataset-path", str(path), "--num-prompts", "0",
        "--trace-length-scale", "0.125", "--trace-time-scale", "2", "--max-concurrency", "1",
    )  # fmt: skip
    assert summary["completed"] == 8
    assert summary["total_input_tokens"] == sum(lengths) // 8
    # The first two blocks of the trace are 64 tokens here, and common to all.
    assert summary["cached_tokens"] == 7 * 128


def test_a_trace_replays_through_two_and_two(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """With its arrival times: ticks that several requests share, prompts that continue others."""
    path = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": 3000 * (i // 4), "input_length": 900 + 512 * (i % 4), "output_length": 160,
         "hash_ids": [0, *(100 * (i % 3) + j for j in range(1 + i % 4))]}
        for i in range(24)
    ]  # fmt: skip
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    with deployment(checkpoint("llama"), prefill=2, decode=2) as served:
        summary = bench(
            served, "--dataset-name", "trace", "--dataset-path", str(path), "--num-prompts", "0",
            "--trace-length-scale", "0.0625", "--trace-time-scale", "6",
            "--trace-max-input-len", "120", "--trace-max-output-len", "8",
        )  # fmt: skip
    assert summary["completed"] == 24
    lengths = [min(120, round((900 + 512 * (i % 4)) / 16)) for i in range(24)]
    assert summary["total_input_tokens"] == sum(lengths)
    assert summary["total_output_tokens"] == 24 * 8
    # Five gaps of 3 s, six times as fast; the last tick is spread over another one.
    assert summary["duration_s"] > 2.5
    assert summary["cached_tokens"] > 0
