"""The extension of a part of a trace, and the table beside the known figures."""

import json
from pathlib import Path

import pytest

from benchmarks import simulate_reference
from router.simulate import trace


def write(path: Path) -> str:
    rows = (
        {
            "timestamp": 3000 * (i // 10),
            "input_length": 1000,
            "output_length": 5,
            "hash_ids": [0, 1 + i // 2],
        }
        for i in range(100)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_trace_is_extended_by_its_last_third_with_new_blocks(tmp_path: Path) -> None:
    requests = trace.load(write(tmp_path / "t.jsonl"))
    longer = simulate_reference.extend(requests, 170)
    assert longer[:100] == requests and len(longer) == 170
    times = [request.arrival for request in longer]
    assert times == sorted(times)
    assert all(at % simulate_reference.TICK_S == 0 for at in times)
    # What all share stays, what a pair shares is shared by the same pair anew.
    assert len({request.blocks[0] for request in longer}) == 1
    assert len({request.blocks[1] for request in longer}) == 50 + 15 + 15 + 5
    assert longer[100].blocks[1] == longer[101].blocks[1]


def test_the_table_names_the_known_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--trace", write(tmp_path / "t.jsonl"), "--requests", "120", "--json", str(out)]
    assert simulate_reference.main([*arguments, "--rules", "pooled"]) == 0
    kept = json.loads(out.read_text())
    assert kept["requests"] == 120 and set(kept["rules"]) == {"pooled"}
    row = kept["rules"]["pooled"]
    assert row["reference"]["g90"] == 14.1
    assert row["ratio"]["hit"] == pytest.approx(row["values"]["hit"] / 0.37)
    assert capsys.readouterr().out.startswith("pooled")
