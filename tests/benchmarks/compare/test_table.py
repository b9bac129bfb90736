"""The table: medians, ratios in the direction in which more is better, gaps."""

from benchmarks.compare.loads import OUTPUT, TPOT, Closed
from benchmarks.compare.table import ratio, table


def test_ratios_above_one_are_better() -> None:
    assert ratio(TPOT, 10.0, 20.0) == 2.0
    assert ratio(OUTPUT, 10.0, 20.0) == 0.5
    assert ratio(OUTPUT, None, 20.0) is None


def test_table_shows_medians_and_ratios() -> None:
    load = Closed("c1", 1, 1, 1, 1, (TPOT, OUTPUT))
    measurements = {
        ("ours", "c1"): [
            {"median_tpot_ms": 10.0, "output_throughput": 100.0},
            {"median_tpot_ms": 11.0, "output_throughput": 90.0},
            {"median_tpot_ms": 50.0, "output_throughput": 300.0},
        ],
        ("rival", "c1"): [{"median_tpot_ms": 22.0, "output_throughput": 50.0}],
    }
    systems = {"ours": "Ours", "rival": "Rival", "gone": "Gone"}
    assert table(measurements, systems, [load], "rival") == (
        "| system | c1 TPOT ms   | c1 tok/s    |\n"
        "|--------|--------------|-------------|\n"
        "| Ours   | 11.0 (x2.00) | 100 (x2.00) |\n"
        "| Rival  | 22.0         | 50.0        |\n"
        "| Gone   | -            | -           |"
    )
