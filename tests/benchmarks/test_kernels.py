"""The benchmark of the CPU kernels: floors and shares, and what is written."""

import pytest
import torch

from benchmarks import kernels, kernels_table
from benchmarks.kernels_model import llama_135m, matrix_bytes, random_matrix, step_rows
from benchmarks.kernels_table import Machine, line
from common.model.quantize import SCHEMES, quantize

MACHINE = Machine(threads=2, bytes_per_s=40e9, flops_per_s=200e9, integers_per_s=400e9)


def test_the_floor_is_the_larger_of_reading_and_multiplying() -> None:
    memory = line("m", MACHINE, 0.002, 40e6, 1e6)
    assert (memory.bound, memory.floor_ms, memory.gb_per_s) == ("memory", 1.0, 20.0)
    assert memory.share == pytest.approx(0.5)
    compute = line("c", MACHINE, 0.002, 1e6, 200e6)
    assert compute.bound == "compute"
    assert compute.floor_ms == pytest.approx(1.0)


def test_integers_have_their_own_rate_but_attention_has_not() -> None:
    assert line("x", MACHINE, 1.0, 0, 400e6, "w8a8").floor_ms == pytest.approx(1.0)
    assert line("x", MACHINE, 1.0, 0, 400e6, "int8").floor_ms == pytest.approx(2.0)
    found = line("x", MACHINE, 1.0, 0, 600e6, "w8a8", attention=200e6)
    assert found.floor_ms == pytest.approx(2.0)


def test_a_page_has_one_row_for_each_line() -> None:
    document = {
        "machine": {"cpu": "CPU"}, "date": "2026-11-20T20:00:00", "commit": "abc",
        "command": "python -m x", "busy_share": 0.01,
    }  # fmt: skip
    lines = [line("one", MACHINE, 0.002, 40e6, 1e6), line("two", MACHINE, 0.001, 40e6, 1e6)]
    page = kernels_table.page(document, [MACHINE], lines)
    assert page.splitlines() == [
        "# CPU kernels against their floors",
        "",
        "`python -m x`: CPU, 2026-11-20, commit abc, machine 1% busy before. Share: of the floor, "
        "100 % is perfect.",
        "",
        "- 2 threads: reads 40.0 GB/s, multiplies 200 GFLOP/s in bfloat16, 400 GOP/s in 8-bit "
        "integers",
        "",
        "| kernel | ms | floor ms | share | bound | GB/s | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| one | 2.000 | 1.000 | 50% | memory | 20.0 | 0.5 |",
        "| two | 1.000 | 1.000 | 100% | memory | 40.0 | 1.0 |",
    ]


def test_bytes_are_those_that_a_product_reads() -> None:
    dense = random_matrix(64, 128)
    assert matrix_bytes(dense) == 64 * 128 * 2
    assert matrix_bytes(quantize(dense, SCHEMES["w8a8"])) == 64 * 128 + 64 * 4
    (row,) = step_rows(1, 4, 20)
    assert (len(row.tokens), row.start, len(row.blocks)) == (4, 20, 2)


def test_every_elementwise_kernel_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TIME_S", 0.0)
    torch.manual_seed(0)
    one = Machine(threads=1, bytes_per_s=40e9, flops_per_s=200e9, integers_per_s=400e9)
    found = [measured.kernel for measured in kernels.measure_rows(one, llama_135m())]
    assert found == [
        "rms_norm 576, 32 rows", "rotate and store 64, 384 heads", "swiglu 1536, 32 rows",
    ]  # fmt: skip
