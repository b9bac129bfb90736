"""The overlap benchmark, on a model so small that it is over soon."""

from pathlib import Path

from benchmarks import overlap
from benchmarks.overlap_client import Plan
from benchmarks.overlap_figures import Measured, Stream, Turn, figures, report
from benchmarks.overlap_worker import Arrival, Diary, EngineStep
from common import random_model


async def test_a_tiny_run_gives_every_figure(tmp_path: Path) -> None:
    random_model.write(tmp_path)
    plan = Plan(
        tmp_path,
        prompt_tokens=96,
        chunk_tokens=32,
        outputs=4,
        repeats=1,
        streams=2,
        turns=1,
        turn_s=0.2,
        kv_blocks=1024,
    )
    found = await overlap.measure(plan)
    for gaps in (found["idle"], found["paced"], found["busy"]):
        assert gaps["gap_ms_max"] >= gaps["gap_ms_p50"] >= 0 and gaps["itl_ms"] >= 0
    assert 0 <= found["held"]["share_when_last_chunk_starts"] <= 1
    assert found["prefill"]["shipped_s"] > 0 and found["exposed_ms"] > 0
    for steps in found["steps"].values():
        assert steps["with"]["steps"] > 0 < steps["without"]["steps"] and steps["mbps"] > 0
    assert len(report(found).splitlines()) == 7


def test_figures() -> None:
    alone = Stream(1, 0.0, [3.5])
    shipped = Stream(2, 10.0, [15.0, 15.07, 15.11, 15.15])
    prefill = Diary(
        steps=[
            EngineStep(1.0, 2.0, 1, 512),
            EngineStep(2.0, 3.0, 1, 512),
            EngineStep(11.0, 12.0, 1, 512),
            EngineStep(12.5, 13.5, 1, 512),
        ]
    )
    decode = Diary(
        steps=[
            EngineStep(20.0, 20.01, 2, 2),
            EngineStep(20.1, 20.5, 2, 40),  # the streams' prompts
            EngineStep(20.6, 20.8, 1, 1),  # not all streams
            EngineStep(21.0, 21.02, 2, 2),
        ],
        arrivals=[Arrival(12.2, 2, 32), Arrival(12.3, 9, 5), Arrival(12.6, 2, 16),
                  Arrival(14.0, 2, 16)],
    )  # fmt: skip
    prefill.exposed_ms = 2.5
    quiet, loaded = Turn(19.9, 20.9, 0.0), Turn(20.9, 21.9, 1.5)
    found = figures(
        Measured(
            alone=[alone],
            idle=[shipped],
            paced=[shipped],
            paced_rate=0.8,
            busy=[shipped],
            quiet=[quiet],
            flooded=[loaded],
            unshipped=[quiet],
            shipped=[loaded],
        ),
        prefill,
        decode,
        num_streams=2,
    )
    steps = {
        "mbps": 1500.0,
        "without": {"p50_ms": 10.0, "p99_ms": 10.0, "steps": 1},
        "with": {"p50_ms": 20.0, "p99_ms": 20.0, "steps": 1},
        "p99_ratio": 2.0,
    }
    assert found == {
        "idle": found["busy"],
        "paced": found["busy"] | {"decode_rate": 0.8},
        "busy": {
            "itl_ms": 40.0,
            "gap_ms_p50": 70.0,
            "gap_ms_max": 70.0,
            "limit_ms": 75.0,
            "share_within": 1.0,
        },
        "held": {
            "share_when_last_chunk_starts": 0.5,
            "ms_until_70_percent": 100.0,
            "last_chunk_ms": 1000.0,
        },
        "prefill": {"alone_s": 2.0, "shipped_s": 2.5, "ratio": 1.25},
        "exposed_ms": 2.5,
        "steps": {"flood": found["steps"]["worker"], "worker": steps},
    }
