"""The comparison of placement rules: what a point holds, and that kept points stay."""

import json
from pathlib import Path

import pytest

from benchmarks import simulate


def write(directory: Path) -> None:
    rows = (
        {
            "timestamp": 300 * i,
            "input_length": 3000 + 600 * (i % 5),
            "output_length": 20,
            "hash_ids": [0, 1 + i % 3, 10 + i],
        }
        for i in range(40)
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "mooncake_conversation_part.jsonl").write_text(text)


def test_points_are_added_to_those_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "POLICIES", ("tandem", "conductor", "sticky"))
    write(tmp_path)
    out = tmp_path / "results" / "simulate.json"
    arguments = ["--traces", str(tmp_path), "--json", str(out), "--tolerance", "0.5"]
    assert simulate.main([*arguments, "--points", "conversation:1"]) == 0
    first = json.loads(out.read_text())["points"][0]
    assert first["prefill"] == first["decode"] == 1 and first["part"] == [0.5, 1.0]
    assert set(first["policies"]) == {"tandem", "conductor", "sticky"}
    assert all(p["g90"] >= p["g99"] for p in first["policies"].values())
    assert simulate.main([*arguments, "--points", "conversation:1", "conversation:2"]) == 0
    kept = json.loads(out.read_text())
    assert kept["points"][0] == first
    assert [point["prefill"] for point in kept["points"]] == [1, 2]
    assert kept["geometric_mean"] == simulate.mean(kept["points"])


def test_ratios_are_to_the_best_of_the_others_in_each() -> None:
    values = {"tandem": (12.0, 9.0, 2.0), "a": (10.0, 3.0, 5.0), "b": (8.0, 10.0, 1.0)}
    ratios = simulate.ratios(values)
    assert ratios == {"g90_ratio": 1.2, "g99_ratio": 0.9, "ttft_p99_ratio": 0.5}
    assert simulate.mean([ratios, ratios]) == pytest.approx(ratios)
