"""What the simulator is told of a deployment, and the figures that are put beside each other."""

import json
from pathlib import Path

import pytest

from benchmarks import simulate_fidelity
from benchmarks.client import Record
from benchmarks.datasets import trace_queries
from router.simulate.model import Hardware

COSTS = {
    "prefill_s": 0.01, "token_s": 1e-3, "pair_s": 1e-8, "step_s": 0.02, "row_s": 1e-4, "kv_s": 1e-7,
}  # fmt: skip


def worker(role: str, factor: float) -> dict[str, object]:
    return {
        "role": role,
        "num_blocks": 100,
        "block_size": 32,
        "token_bytes": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "costs": {name: value * factor for name, value in COSTS.items()},
    }


def test_prompts_cost_what_prefill_workers_say_and_steps_what_decode_workers_say() -> None:
    workers = [worker("decode", 2.0), worker("prefill", 1.0)]
    found = simulate_fidelity.hardware(workers, 64, 1e9)
    assert found == Hardware(
        prefill_s=0.01,
        token_s=1e-3,
        pair_s=1e-8,
        step_s=0.04,
        row_s=2e-4,
        kv_s=2e-7,
        kv_bytes_per_token=2048,
        link_bytes_per_s=1e9,
        block_tokens=64,
        prefill_blocks=50,
        decode_blocks=50,
        max_num_seqs=8,
        chunk_tokens=256,
        local_chunk_tokens=256,
    )
    assert simulate_fidelity.hardware(workers[:1], 64, 1e9).token_s == 2e-3


def test_the_simulator_gets_the_lengths_that_were_sent(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1300, "output_length": 64, "hash_ids": [0, 1, 2]},
        {"timestamp": 500, "input_length": 900, "output_length": 8, "hash_ids": [0, 3]},
        {"timestamp": 900, "input_length": 900, "output_length": 8, "hash_ids": [0, 3]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = list(trace_queries(path, 100, (0,), length_scale=1 / 32, max_input_len=32, limit=2))
    first, second = simulate_fidelity.recorded(path, queries, 16)
    assert (first.prompt, first.output, len(first.blocks)) == (32, 2, 2)
    assert (second.prompt, second.output, len(second.blocks)) == (28, 1, 2)
    assert first.blocks[0] == second.blocks[0]
    jobs = simulate_fidelity.simulated([first, second], [0.0, 5.0], Hardware(), 1, 1, 0)
    figures = simulate_fidelity.simulated_figures(jobs)
    assert 0 < figures["ttft_p50"] <= figures["e2e_p50"] <= figures["e2e_p99"]


def test_measured_figures_are_those_of_the_records() -> None:
    def record(ttft: float, cached: int) -> Record:
        return Record(
            due=0.0, sent=1.0, chunks=[1.0 + ttft, 2.0 + ttft], ended=2.0 + ttft,
            input_len=100, output_len=2, cached_tokens=cached, status=200,
        )  # fmt: skip

    figures = simulate_fidelity.measured_figures([record(0.5, 0), record(1.5, 50)])
    assert figures["ttft_mean"] == figures["ttft_p50"] == pytest.approx(1.0)
    assert figures["tpot_mean"] == pytest.approx(1.0)
    assert figures["e2e_p50"] == pytest.approx(2.0)
    assert figures["hit"] == 0.25
