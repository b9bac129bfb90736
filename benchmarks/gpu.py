"""The GPU engine, measured: `python -m benchmarks.gpu [--json FILE] [--part NAME ...]`.

One command, under 8 minutes on an H200. In this order, and written to the JSON file after each:

1. `machine`: copy bandwidth within the device and the rate of a large bfloat16 product. Every floor
   below is bytes over the one or operations over the other, whichever takes longer.
2. `checks`: every kernel against float64 on random ragged inputs.
3. `kernels`: every kernel timed (graph replays between CUDA events, medians, operands in turn from
   sets larger than the cache) against its floor, and beside torch's SDPA and FlashAttention.
4. `models`: random models of the shapes of Llama 3 8B and 1B, end to end: prefill tokens/s and
   MFU, decode tokens/s at batch 1, 8, 32 and 128 and the share of the bandwidth floor, a step that
   mixes both (colocated), and 1P1D in two processes on the one GPU.

It needs torch and triton and nothing else: no part imports pyzmq, msgspec, redis or fastapi. The
1P1D part therefore has a sender and a receiver of its own, over a Unix socket and CUDA IPC, and
says so; what it could not do it prints. `--self-test` runs the same code on a CPU, in Triton's
interpreter, on sizes that mean nothing as a measurement. `--tune` times other tile shapes and
prints those that beat the table in `common/model/triton/tuning.json`.

Written and self-tested where there was no GPU: the kernels compile for sm_80, sm_89 and sm_90 and
pass in the interpreter; CUDA graphs, CUDA events, CUDA IPC and all figures await their first run.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

PARTS: Final = ("checks", "kernels", "models", "pair")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; repeatable")
    parser.add_argument("--self-test", action="store_true", help="on the CPU, interpreted")
    parser.add_argument("--tune", action="store_true", help="look for better tile shapes")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.self_test:
        # Before triton is imported, and for the processes started from here.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device; --self-test runs without one", file=sys.stderr)
        return 1
    device = torch.device("cpu" if interpreted else "cuda")
    torch.manual_seed(0)
    if arguments.peer:
        return _serve_peer(device, *arguments.peer)
    if arguments.tune:
        from benchmarks.cuda.tune import tune

        return tune(device)
    return _Report(arguments.json).run(device, arguments.part or PARTS, small=interpreted)


def _serve_peer(device: Any, path: str, name: str, num_blocks: str) -> int:
    from benchmarks.cuda.measure import Machine
    from benchmarks.cuda.pair import serve

    serve(path, name, Machine("", device, 0, 1.0, 1.0), int(num_blocks))
    return 0


class _Report:
    """Prints lines as they come and keeps the JSON file up to date."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._began = time.perf_counter()
        self._results: dict[str, Any] = {"notes": []}

    def run(self, device: Any, parts: Sequence[str], *, small: bool) -> int:
        """Returns 1 if a kernel is wrong, a pair's tokens differ, or a part broke off."""
        import torch
        import triton

        from benchmarks.cuda.measure import measure_machine

        machine = measure_machine(device)
        self._results["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
        self._results["machine"] = {**asdict(machine), "device": str(machine.device)}
        self._say(
            f"{machine.name}: copies {machine.bytes_per_s / 1e12:.2f} TB/s, multiplies "
            f"{machine.flops_per_s / 1e12:.0f} TFLOP/s; torch {torch.__version__}, "
            f"triton {triton.__version__}"
        )
        self._write()
        failed = False
        if "checks" in parts:
            failed |= self._try("checks", lambda: self._checks(machine, small))
        if "kernels" in parts:
            failed |= self._try("kernels", lambda: self._kernels(machine, small))
        if "models" in parts or "pair" in parts:
            for name in ("tiny",) if small else ("1B", "8B"):
                model = partial(self._model, name, machine, parts, small)
                failed |= self._try(f"model {name}", model)
        self._say(f"done in {time.perf_counter() - self._began:.0f} s")
        return int(failed)

    def _try(self, name: str, part: Callable[[], bool]) -> bool:
        """Run a part, which returns whether something is wrong. One that breaks off is reported
        and leaves the others their turn and what it wrote."""
        import torch

        try:
            return part()
        except Exception as error:
            traceback.print_exc()
            self._note(f"{name} BROKE OFF: {type(error).__name__}: {error}")
            return True
        finally:
            # The next part, and the process beside this one, need the memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _checks(self, machine: Any, small: bool) -> bool:
        from benchmarks.cuda.correctness import check_all

        checks = []
        for check in check_all(machine, small=small):
            checks.append({**asdict(check), "passed": check.passed})
            if not check.passed:
                self._say(f"WRONG: {check.kernel}: {check.error:.2e}, at most {check.limit:.0e}")
        wrong = sum(not check["passed"] for check in checks)
        self._say(f"{len(checks) - wrong} of {len(checks)} checks passed")
        self._results["checks"] = checks
        self._write()
        return wrong > 0

    def _kernels(self, machine: Any, small: bool) -> bool:
        if small:
            self._note("kernels are not timed: they are interpreted")
            return False
        from benchmarks.cuda.kernels import time_all

        lines = self._results["kernels"] = []
        self._say(f"{'kernel':54} {'us':>9} {'floor':>9} {'share':>6} bound    TB/s  TFLOP/s")
        broken = False
        for line in time_all(machine):
            if isinstance(line, str):
                broken = True
                self._note(line)
                continue
            lines.append({**asdict(line), "share": line.share})
            rivals = ", ".join(
                f"{name} {value:.1f}" if isinstance(value, float) else f"{name}: {value}"
                for name, value in line.rivals.items()
            )
            self._say(
                f"{line.kernel:54} {line.us:9.1f} {line.floor_us:9.1f} {line.share:6.0%} "
                f"{line.bound:7} {line.tb_per_s:5.2f} {line.tflop_per_s:8.0f}  {rivals}"
            )
            self._write()
        return broken

    def _model(self, name: str, machine: Any, parts: Sequence[str], small: bool) -> bool:
        lines = self._results.setdefault("models", [])
        self._say(f"{'model':5} {'what':62} {'tokens/s':>9} {'ms':>9} {'share':>6}")
        differ = False
        for result in _measure_model(name, machine, parts, small):
            if isinstance(result, str):
                differ |= "DIFFERENT" in result
                self._note(result)
                continue
            lines.append(asdict(result))
            self._say(
                f"{result.model:5} {result.what:62} {result.tokens_per_s:9.0f} "
                f"{result.ms:9.2f} {result.share:6.0%}"
            )
            self._write()
        return differ

    def _note(self, text: str) -> None:
        self._results["notes"].append(text)
        self._say(text)
        self._write()

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _write(self) -> None:
        if self._path is not None:
            self._results["seconds"] = time.perf_counter() - self._began
            self._path.write_text(json.dumps(self._results, indent=1) + "\n")


def _measure_model(name: str, machine: Any, parts: Sequence[str], small: bool) -> Iterator[Any]:
    from benchmarks.cuda import models, pair

    model = models.Model(name, machine, 24 if small else 4096)
    if "models" in parts:
        for count in (70,) if small else (2048, 8192):
            yield models.measure_prefill(model, count, 1 if small else 4)
        for batch in (1, 3) if small else models.BATCHES:
            yield models.measure_decode(model, batch, 60 if small else 1024, 3 if small else 64)
        if not small:
            yield models.measure_decode(model, 32, 4096, 32)
        sizes = (2, 60, 64, 2) if small else (32, 1024, 1024, 8)
        yield from models.measure_mixed(model, *sizes)
    if "pair" in parts:
        missing = [one for one in ("zmq", "msgspec") if not _importable(one)]
        why = f"{' and '.join(missing)} missing" if missing else "it would go through host memory"
        yield f"1P1D: not over the project's transfer endpoint ({why}): a socket and its own copies"
        if machine.cuda:
            machine.free()
        batch, context, prompt, chunk = (2, 60, 100, 64) if small else (32, 1024, 8192, 2048)
        try:
            yield from pair.measure_pair(
                model, batch=batch, context=context, prompt=prompt, chunk=chunk
            )
        except (OSError, RuntimeError) as error:
            yield f"1P1D {name}: NOT MEASURED: {error}"


def _importable(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
