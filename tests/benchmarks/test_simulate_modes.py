"""The comparison of modes: what a point holds, and that choosing pays where prompts queue."""

import json
from pathlib import Path

from benchmarks import simulate_modes


def test_a_point_compares_all_modes_at_all_loads(tmp_path: Path) -> None:
    out = tmp_path / "modes.json"
    arguments = ["--prompts", "2000", "--outputs", "10", "--requests", "200", "--json", str(out)]
    assert simulate_modes.main(arguments) == 0
    (point,) = json.loads(out.read_text())["points"]
    assert (point["prompt"], point["output"]) == (2000, 10)
    assert [row["load"] for row in point["loads"]] == list(simulate_modes.LOADS)
    for row in point["loads"]:
        assert set(row["goodput"]) == set(simulate_modes.MODES)
        assert row["ratio"] >= 0.97
        assert 0 < row["local"] < 1
    # Two workers that prefill bear more prompts than one.
    assert point["loads"][-1]["ratio_to_static"] > 1.2
