"""What the cores can do: memory bandwidth and matrix products, alone and beside busy neighbours.

`python -m benchmarks.rates 0,1` prints one JSON object: `all`, the rates of these cores together,
and `one`, those of the first one while each of the others multiplies matrices without a pause. They
are the floors of `benchmarks.compare`, which runs this before and after what it measures. None of
it uses code of Tandem.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.compare.paths import ROOT
from benchmarks.control import best, gemm_gflop_s, read_gb_s

INT8 = (512, 2048, 2048)
"""Rows, inner size and columns of the product in integers."""
REPEATS = 30


def int8_gop_s() -> float:
    """A product of 8-bit integers, in 10^9 operations per second."""
    rows, inner, columns = INT8
    left = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
    right = torch.randint(-127, 128, (inner, columns), dtype=torch.int8)
    seconds = best(lambda: torch._int_mm(left, right), REPEATS)
    return 2 * rows * inner * columns / seconds / 1e9


def measured() -> dict[str, float]:
    """The rates of torch's threads as they are set now."""
    return {"read_gb_s": read_gb_s(), "gemm_gflop_s": gemm_gflop_s(), "int8_gop_s": int8_gop_s()}


@contextmanager
def busy(cores: Sequence[int]) -> Iterator[None]:
    """Each of these cores multiplies matrices for as long as this is held."""
    with ExitStack() as stack:
        started = []
        for core in cores:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.compare.pinned", str(core),
                 sys.executable, "-m", "benchmarks.rates", "--busy"],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.terminate)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise ChildProcessError("a process that keeps a core busy ended at once")
        yield


def keep_busy() -> None:
    """Until this process is ended; says when it has begun."""
    torch.set_num_threads(1)
    gemm_gflop_s()
    print("busy", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        gemm_gflop_s()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    parser.add_argument("cores", nargs="?", help="such as 0,1; none: all usable ones")
    parser.add_argument("--busy", action="store_true", help="keep a core busy and say nothing else")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.busy:
        keep_busy()
        return 0
    usable = sorted(os.sched_getaffinity(0))
    cores = [int(core) for core in args.cores.split(",")] if args.cores else usable
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    together = measured()
    os.sched_setaffinity(0, cores[:1])
    torch.set_num_threads(1)
    with busy(cores[1:]):
        one = measured()
    print(json.dumps({"cores": len(cores), "all": together, "one": one}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
