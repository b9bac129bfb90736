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


def test_points_and_seeds_are_added_to_those_that_are_kept(tmp_path: Path) -> None:
    write(tmp_path)
    out = tmp_path / "results" / "simulate.json"
    arguments = ["--traces", str(tmp_path), "--json", str(out), "--tolerance", "0.5"]
    arguments += ["--rivals", "conductor", "sticky"]
    assert simulate.main([*arguments, "--points", "conversation:1"]) == 0
    first = json.loads(out.read_text())["points"][0]
    assert first["prefill"] == first["decode"] == 1 and first["part"] == [0.5, 1.0]
    assert set(first["policies"]) == {"tandem", "conductor", "sticky"}
    assert all(p["g90"] >= p["g99"] for p in first["policies"].values())
    more = ["--points", "conversation:1", "conversation:2", "--seeds", "0", "1"]
    assert simulate.main([*arguments, *more]) == 0
    kept = json.loads(out.read_text())
    assert kept["points"][0] == first
    points = [(point["prefill"], point["seed"]) for point in kept["points"]]
    assert points == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(row["prefill"], row["seeds"]) for row in kept["summary"]] == [(1, 2), (2, 2)]
    assert kept["geometric_mean"] == simulate.mean(kept["summary"])


def test_ratios_are_to_the_best_of_the_others_in_each() -> None:
    values = {"tandem": (12.0, 9.0, 2.0), "a": (10.0, 3.0, 5.0), "b": (8.0, 10.0, 1.0)}
    ratios = simulate.ratios(values)
    assert ratios == {"g90_ratio": 1.2, "g99_ratio": 0.9, "ttft_p99_ratio": 0.5}
    assert simulate.mean([ratios, ratios]) == pytest.approx(ratios)


def test_where_nobody_serves_99_percent_there_is_no_ratio() -> None:
    ratios = simulate.ratios({"tandem": (12.0, 0.0, 2.0), "a": (10.0, 0.0, 5.0)})
    assert ratios == {"g90_ratio": 1.2, "g99_ratio": None, "ttft_p99_ratio": 2.5}
    assert simulate.mean([ratios])["g99_ratio"] is None


def test_a_summary_is_the_median_over_seeds() -> None:
    key = {"trace": "conversation", "part": [0.0, 1.0], "prefill": 8}
    values = [dict.fromkeys(simulate.RATIOS, value) for value in (1.0, 3.0, 1.5)]
    (row,) = simulate.medians([key | value for value in values])
    assert row == key | {"seeds": 3} | dict.fromkeys(simulate.RATIOS, 1.5)
