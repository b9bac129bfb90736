"""`tandem bench sweep` against servers whose times are known, and what it refuses."""

import argparse
import asyncio
import json
import math
import os
import sys
from pathlib import Path

import pytest

from benchmarks import contenders, machine, sweep, sweep_run
from benchmarks.contenders import Contender
from tests.benchmarks.slow_server import slow_server

ROOT = Path(__file__).parents[2]


def arguments(*argv: str) -> argparse.Namespace:
    args = sweep.parser().parse_args(argv)
    args.seed = 1
    return args


async def test_turns_points_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    async with slow_server(0.02, 0.005) as fast, slow_server(0.3, 0.005) as slow:
        argv = [
            "--topologies", "none", "--url", f"fast={fast.url},units=1",
            "--url", f"slow={slow.url},model=m,units=1", "--rates", "40,20", "--repeats", "2",
            "--point-seconds", "0.2", "--min-prompts", "5", "--random-output-len", "4",
            "--random-input-len", "6", "--slo", "ttft:200ms,tpot:100ms", "--seed", "3",
            "--output", str(output),
        ]  # fmt: skip
        assert await asyncio.to_thread(sweep.main, argv) == 0
        assert fast.prompts == slow.prompts, "all get the same requests"
    # Two warm-ups, then 5 and 8 requests; every prompt is a new one.
    assert len(fast.prompts) == 2 * (2 + 5 + 2 + 8)
    assert len({tuple(prompt) for prompt in fast.prompts}) == len(fast.prompts)
    document = json.loads((output / "sweep.json").read_text())
    order = [(p["repeat"], p["contender"], p["rate"]) for p in document["points"]]
    assert order == [
        (repeat, name, rate) for repeat in (0, 1) for name in ("fast", "slow")
        for rate in (20.0, 40.0)
    ]  # fmt: skip
    for point in document["points"]:
        figures = point["figures"]
        assert figures["completed"] == (5 if point["rate"] == 20 else 8)
        assert figures["slo_attainment"] == (1.0 if point["contender"] == "fast" else 0.0)
    assert document["failures"] == []
    assert document["advice"][0].startswith("No topology of Tandem was measured")
    assert document["advice"][1] == "fast holds 40.0 requests/s, 40.0 per core."
    assert (output / "report.html").is_file()
    assert f"{output / 'report.html'}" in capsys.readouterr().out


async def test_what_does_not_answer_is_told(tmp_path: Path) -> None:
    async with slow_server(0.0, 0.0) as server:
        argv = [
            "--topologies", "none", "--url", f"there={server.url}", "--url",
            "gone=http://127.0.0.1:9", "--rates", "50", "--repeats", "1", "--min-prompts", "3",
            "--point-seconds", "0.01", "--output", str(tmp_path),
        ]  # fmt: skip
        assert await asyncio.to_thread(sweep.main, argv) == 1
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert [p["contender"] for p in document["points"]] == ["there"]
    (failure,) = document["failures"]
    assert failure.startswith("gone: warm-up request failed: ClientConnectorError")


async def test_what_was_measured_survives_a_kill(tmp_path: Path) -> None:
    async with slow_server(0.0, 0.0) as quick, slow_server(600.0, 0.0) as stuck:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "deploy.cli", "bench", "sweep", "--topologies", "none",
            "--url", f"quick={quick.url}", "--url", f"stuck={stuck.url}", "--rates", "50",
            "--min-prompts", "3", "--point-seconds", "0.01", "--num-warmups", "0",
            "--output", str(tmp_path), cwd=ROOT, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        while len(stuck.prompts) < 3:
            await asyncio.sleep(0.05)
        process.kill()
        await process.wait()
    assert sweep.main(["--render", str(tmp_path / "sweep.json")]) == 0
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert [p["contender"] for p in document["points"]] == ["quick"]


async def test_rates_are_found_by_a_probe(tmp_path: Path) -> None:
    async with slow_server(0.1, 0.0) as server:
        found = Contender("x", 1.0, url=server.url)
        args = arguments("--random-output-len", "1")
        rates = await asyncio.to_thread(sweep_run.auto_rates, found, [0], tmp_path, args)
    # 8 streams of 0.1 s each.
    assert len(rates) == len(sweep_run.AUTO_SHARES) and rates == sorted(rates)
    assert 30 < rates[-1] / sweep_run.AUTO_SHARES[-1] <= 80.0 * 1.05


def test_a_trace_keeps_its_bursts_at_any_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    times = [0, 0, 0, 3000, 9000, 9000, 12000, 15000]
    path.write_text("".join(
        json.dumps({"timestamp": t, "input_length": 9, "output_length": 3}) + "\n" for t in times
    ))  # fmt: skip
    args = arguments("--dataset-name", "trace", "--dataset-path", str(path), "--min-prompts", "8")
    slow, fast = (sweep_run.point_plan(args, rate, 0) for rate in (2.0, 8.0))
    assert slow.due[-1] == pytest.approx(3.5) and fast.due[-1] == pytest.approx(7 / 8)
    assert [a / 4 for a in slow.due] == pytest.approx(list(fast.due))
    assert slow.max_seconds == pytest.approx(3.5 + 30)
    assert set(sweep_run.point_plan(args, math.inf, 0).due) == {-math.inf}


def test_contenders() -> None:
    split = contenders.topology("1p2d", 2, 2.0)
    assert (split.name, split.prefill, split.decode, split.pinned) == ("1P2D", 1, 2, False)
    assert contenders.topology("colocated", 2, 2.0).pinned
    assert contenders.topology("0p2d", 2, 2.0).name == "colocated x2"
    other = contenders.running("vllm=http://h:1/,model=m,units=4", 2.0)
    assert other == Contender("vllm", 4.0, url="http://h:1", model="m")
    assert not other.started
    given = contenders.running("1p2d=http://h:2", 8.0)
    assert given == Contender("1P2D", 8.0, 1, 2, "http://h:2")
    command = contenders.up_command(split, 81, [0, 1], "/m", "--dtype float32")
    assert command.argv[2:] == (
        "deploy.cli", "up", "--port", "81", "--prefill", "1", "--decode", "2", "--model", "/m",
        "--dtype", "float32",
    )  # fmt: skip
    pinned = contenders.up_command(contenders.topology("1p1d", 2, 2.0), 81, [0, 1], None, "")
    assert pinned.argv[-2:] == ("--pin-cores", "0,1")


def test_the_client_stays_off_the_cores_of_the_servers() -> None:
    usable = os.sched_getaffinity(0)
    first = min(usable)
    with sweep_run.beside([first]):
        assert os.sched_getaffinity(0) == (usable - {first} or usable)
    with sweep_run.beside(sorted(usable)):
        assert os.sched_getaffinity(0) == usable
    assert os.sched_getaffinity(0) == usable
    assert machine.cores(str(first)) == [first] and machine.cores("") == sorted(usable)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--topologies", "1p"], "--topologies: '1p' is not colocated or such as 1p2d"),
        (["--topologies", "1p0d"], "--topologies: '1p0d' is not colocated or such as 1p2d"),
        (["--topologies", "none"], "nothing to measure: --topologies or --url"),
        (["--url", "http://x"], "--url: 'http://x' is not NAME=URL[,model=NAME][,units=N]"),
        (["--url", "a=http://x,cores=2"], "--url: 'cores=2' is not model=NAME or units=N"),
        (["--url", "a=http://x,units=0"], "--url: units must be above 0"),
        (["--url", "1P1D=http://x"], "two contenders have the same name"),
        (["--rates", "1,x"], "--rates: '1,x' is not auto or a list of rates above 0"),
        (["--rates", "0"], "--rates: '0' is not auto or a list of rates above 0"),
        (["--cores", "0-x"], "'0-x' is not a list of cores such as 0,2-4"),
        (["--cores", "4095"], "core 4095 is not among the usable cores "),
        (["--slo", ""], "--slo is empty"),
        (["--attainment", "90"], "--attainment must be between 0 and 1"),
        (["--repeats", "0"],
         "--repeats, --min-prompts, --point-seconds, --grace must be above 0"),
        (["--dataset-name", "trace"], "--dataset-name trace needs --dataset-path"),
        (["--backend", "openai-chat"],
         "--backend openai-chat takes text: it needs --tokenizer"),
    ],
)  # fmt: skip
def test_clashes_are_told_before_anything_starts(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert sweep.main([*argv, "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"tandem bench sweep: error: {line}")
    assert not output.exists()
