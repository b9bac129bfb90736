"""`tandem bench serve`: measure an OpenAI-compatible server.

    tandem bench serve --base-url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200

Flags are named as in `vllm bench serve` where they exist. The last line of the output is the
summary as one JSON object if `--json -` is given.
"""

import argparse
import asyncio
import gc
import json
import math
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import load, machine, stats
from benchmarks.client import Record, Target
from benchmarks.run import Run, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--base-url", help="server, such as http://127.0.0.1:8000")
    add("--host", default="127.0.0.1", help="used without --base-url")
    add("--port", type=int, default=8000, help="used without --base-url")
    add("--model", help="model name in the requests; none: the server's default")
    load.add_request_arguments(parser)
    add = parser.add_argument_group("load").add_argument
    add("--num-prompts", type=int, default=200, help="0: all of a trace")
    add("--request-rate", type=float, default=math.inf, help="requests/s; inf: at once")
    add("--burst-size", type=int, default=0, help="send in bursts of this size")
    add("--max-seconds", type=float, default=0.0, help="cut the run; 0: no limit")
    add("--repeats", type=int, default=1, help="runs, for confidence intervals")
    load.add_shape_arguments(parser)
    add = parser.add_argument_group("results").add_argument
    add("--slo", default="", metavar="ttft:500ms,tpot:50ms", help="limits that goodput counts")
    add("--goodput", nargs="*", default=[], metavar="METRIC:MS", help="the same, vLLM's form")
    add("--json", metavar="FILE", help="write summary and records; `-`: summary as last line")
    add("--no-records", action="store_true", help="leave the records out of --json FILE")
    add("--no-progress", "--disable-tqdm", action="store_true", help="no progress bar")


def build_target(args: argparse.Namespace) -> Target:
    return load.target(args, args.base_url or f"http://{args.host}:{args.port}", args.model)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that clash, before anything is sent."""
    load.check(args)
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json: no directory for {args.json}")


def bench(args: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code: 0, 1 if no request completed, 2 for arguments
    that clash."""
    if args.seed is None:
        args.seed = secrets.randbits(32)
    try:
        check(args)
        slo = stats.parse_slo(args.slo) | stats.parse_slo(" ".join(args.goodput))
        target = build_target(args)
        if target.tokenizer is not None and args.vocab_size is None:
            args.vocab_size = target.tokenizer.get_vocab_size()
        plan = load.plan(args, 0)
    except (ValueError, OSError) as error:
        print(f"tandem bench serve: error: {error}", file=sys.stderr)
        return 2
    gc.freeze()  # a long plan is many objects: no pause to look through them again
    runs: list[Run] = []
    summaries: list[dict[str, Any]] = []
    for repeat in range(max(1, args.repeats)):
        plan = load.plan(args, repeat) if repeat else plan
        try:
            runs.append(asyncio.run(run(target, plan, progress=not args.no_progress)))
        except ConnectionError as error:
            print(f"tandem bench serve: error: {error}", file=sys.stderr)
            return 1
        summaries.append(stats.summarize(runs[-1], slo))
    summary = stats.combine(summaries) | {"seed": args.seed}
    print(stats.table(summary))
    failures = Counter(r.error for one in runs for r in one.records if r.error)
    for message, times in failures.most_common(5):
        print(f"error ({times}x): {message}")
    if args.json == "-":
        print(json.dumps(summary))
    elif args.json:
        Path(args.json).write_text(json.dumps(document(args, runs, summary)))
    return 0 if summary["completed"] else 1


def document(
    args: argparse.Namespace, runs: Sequence[Run], summary: dict[str, Any]
) -> dict[str, Any]:
    """What `--json FILE` holds: the summary at the top level, where it comes from, the arguments
    but for secrets, and a record of each request, with times in milliseconds from the start of its
    run, unless they are unwanted."""
    hidden = ("api_key", "header")
    arguments = {key: str(value) for key, value in vars(args).items() if key not in hidden}
    origin = machine.provenance()
    del origin["command"]  # `arguments`, without what is secret
    result = {**summary, **origin, "arguments": arguments}
    if not args.no_records:
        result["records"] = [[_record(r, one.records[0].due) for r in one.records] for one in runs]
    return result


def _record(record: Record, start: float) -> dict[str, Any]:
    def ms(seconds: float) -> float:
        return round(seconds * 1000.0, 3)

    return {
        "due_ms": ms(record.due - start),
        "held_ms": ms(record.held_s),
        "send_lag_ms": ms(record.lag_s),
        "ttft_ms": ms(record.ttft_s) if record.ok else None,
        "itl_ms": [ms(gap) for gap in record.itl_s],
        "e2el_ms": ms(record.e2e_s),
        "input_len": record.input_len,
        "output_len": record.output_len,
        "cached_tokens": record.cached_tokens,
        "status": record.status,
        "error": record.error,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem bench serve", description=__doc__)
    add_arguments(parser)
    return bench(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
