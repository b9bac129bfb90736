"""Floors: counted weights, which bound holds, and what a load cannot beat."""

import os

import pytest

from benchmarks import rates
from benchmarks.compare import __main__ as compare
from benchmarks.compare import floors
from benchmarks.compare.checkpoints import SHAPES, _tensor_sizes
from benchmarks.compare.loads import LOADS, OUTPUT, TPOT, TTFT, Closed
from benchmarks.compare.systems import SYSTEMS
from benchmarks.compare.table import floor_table

RATES = {
    "cores": 2,
    "all": {"read_gb_s": 45.0, "gemm_gflop_s": 350.0, "int8_gop_s": 450.0},
    "one": {"read_gb_s": 30.0, "gemm_gflop_s": 160.0, "int8_gop_s": 400.0},
}
LLAMA = SHAPES["llama-135m"]


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_all_that_a_token_is_multiplied_with(name: str) -> None:
    engine = floors.engine(SHAPES[name], "", RATES, "all")
    sizes = _tensor_sizes(SHAPES[name])
    matrices = [size[0] * size[1] for size in sizes.values() if len(size) == 2]
    assert engine.body + engine.head == sum(matrices), "the tied embedding is the head"


def test_a_step_is_bound_by_memory_until_it_is_bound_by_arithmetic() -> None:
    engine = floors.engine(LLAMA, "", RATES, "all")
    assert engine.decode_s(1, 0) == pytest.approx(134.48e6 * 2 / 45e9, rel=1e-3)
    assert engine.decode_s(64, 0) == pytest.approx(64 * 134.48e6 * 2 / 350e9, rel=1e-3)
    # Keys and values of 1,000 tokens: 30 layers, 3 heads of 64, twice, in bf16.
    added = engine.decode_s(1, 1000) - engine.decode_s(1, 0)
    assert added == pytest.approx(1000 * 30 * 3 * 64 * 2 * 2 / 45e9)


def test_a_prompt_needs_the_head_once_and_attends_to_what_is_before() -> None:
    engine = floors.engine(LLAMA, "", RATES, "all")
    linear = 2 * (2048 * engine.body + engine.head)
    pairs = 2048 * 2049 / 2
    assert engine.prompt_s(2048) == pytest.approx((linear + 4 * pairs * 576 * 30) / 350e9)


def test_integers_have_their_own_rate_and_the_cores_add_up() -> None:
    w8a8 = floors.engine(LLAMA, "w8a8", RATES, "all")
    assert (w8a8.linear_rate, w8a8.attention_rate) == (800e9, 350e9)
    assert w8a8.weight_bytes == 1
    one = floors.engine(LLAMA, "", RATES, "one")
    assert (one.linear_rate, one.bandwidth) == (160e9, 30e9)


def test_no_load_is_faster_than_its_steps() -> None:
    load = Closed("x", 8, 16, 32, 256, (TPOT, OUTPUT))
    found = floors.floors(LLAMA, "", RATES, [load])["x"]
    step = floors.engine(LLAMA, "", RATES, "all").decode_s(8, 160)
    assert found["median_tpot_ms"] == pytest.approx(step * 1e3)
    assert 0.9 * 8 / step < found["output_throughput"] < 8 / step * 256 / 255


def test_floors_are_of_those_loads_that_a_system_is_made_for() -> None:
    systems = [SYSTEMS["tandem"], SYSTEMS["tandem-1p1d"]]
    found = compare.floors_of("llama-135m", systems, LOADS, RATES)
    assert set(found["tandem-1p1d"]) == {"mix"}
    assert set(found["tandem"]) == {load.name for load in LOADS} - {"mix"}
    assert set(found["tandem-1p1d"]["mix"]) == {"decode_throughput", "median_ttft_ms"}
    assert TTFT.key in found["tandem"]["c1"] and TTFT.key not in found["tandem"]["pf"]


def test_the_table_tells_the_share_that_was_reached() -> None:
    load = Closed("x", 1, 1, 1, 1, (TPOT, OUTPUT, TTFT))
    measurements = {
        ("ours", "x"): [{"median_tpot_ms": 12.5, "output_throughput": 80.0, "median_ttft_ms": 1.0}]
    }
    least = {"ours": {"x": {"median_tpot_ms": 10.0, "output_throughput": 100.0}}, "gone": {}}
    assert floor_table(measurements, {"ours": "Ours", "gone": "Gone"}, [load], least) == (
        "| floor (share reached) | x TPOT ms  | x tok/s   |\n"
        "|-----------------------|------------|-----------|\n"
        "| Ours                  | 10.0 (80%) | 100 (80%) |\n"
        "| Gone                  | -          | -         |"
    )


def test_rates_of_several_moments_are_averaged() -> None:
    faster = {
        "cores": 2,
        **{part: {k: 3 * v for k, v in RATES[part].items()} for part in ("all", "one")},  # type: ignore[attr-defined]
    }
    found = floors.averaged([RATES, faster])
    assert found["one"]["gemm_gflop_s"] == 320.0
    assert floors.told(found) == (
        "This run's machine: 2 cores together 90.0 GB/s, 700 GFLOP/s in bf16, 900 GOP/s in int8; "
        "one core with the others busy 60.0 GB/s, 320 GFLOP/s in bf16, 800 GOP/s in int8."
    )


def test_a_neighbour_is_busy_while_it_is_held() -> None:
    core = min(os.sched_getaffinity(0))
    with rates.busy([core, core]):
        pass  # both have said that they are at work
    assert rates.int8_gop_s() > 0
