"""`tandem bench serve`: measure an OpenAI-compatible server.

    tandem bench serve --base-url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200

Flags are named as in `vllm bench serve` where they exist. The last line of the output is the
summary as one JSON object if `--json -` is given.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import math
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arrivals, datasets, stats
from benchmarks.client import Record, Target
from benchmarks.datasets import Query
from benchmarks.run import Plan, Run, run

DATASETS = ("random", "prefix_repetition", "conversation", "trace")
RUN, ARRIVALS, WARMUP = range(3)
"""Streams of randomness that one seed gives."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", help="server, such as http://127.0.0.1:8000")
    server.add_argument("--host", default="127.0.0.1", help="used without --base-url")
    server.add_argument("--port", type=int, default=8000, help="used without --base-url")
    server.add_argument("--endpoint", default="/v1/completions", help="path of the endpoint")
    server.add_argument("--model", help="model name in the requests; none: the server's default")
    server.add_argument("--api-key", help="sent as a Bearer token")
    server.add_argument("--header", action="append", default=[], metavar="KEY=VALUE")
    server.add_argument("--extra-body", default="{}", help="JSON object added to every request")
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, default=200, help="0: all of a trace")
    load.add_argument(
        "--request-rate", type=float, default=math.inf, help="requests/s; inf: at once"
    )
    load.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson; below: burstier; inf: fixed rate"
    )
    load.add_argument("--burst-size", type=int, default=0, help="send in bursts of this size")
    load.add_argument(
        "--max-concurrency", type=int, default=0, help="requests in flight; 0: no limit"
    )
    load.add_argument(
        "--num-warmups", type=int, default=0, help="requests before the run, with other prompts"
    )
    load.add_argument("--max-seconds", type=float, default=0.0, help="cut the run; 0: no limit")
    load.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    load.add_argument("--repeats", type=int, default=1, help="runs, for confidence intervals")
    load.add_argument(
        "--seed", type=int, help="none: a fresh one, so that no earlier run warmed the caches"
    )
    data = parser.add_argument_group("dataset")
    data.add_argument("--dataset-name", choices=DATASETS, default="random")
    data.add_argument("--dataset-path", type=Path, help="trace: Mooncake-format jsonl[.gz]")
    data.add_argument("--vocab-size", type=int, default=256, help="token ids are drawn below this")
    data.add_argument("--random-input-len", type=int, default=256)
    data.add_argument("--random-output-len", type=int, default=64)
    data.add_argument("--random-range-ratio", type=float, default=0.0)
    data.add_argument("--random-prefix-len", type=int, default=0)
    data.add_argument("--prefix-repetition-prefix-len", type=int, default=256)
    data.add_argument("--prefix-repetition-suffix-len", type=int, default=64)
    data.add_argument("--prefix-repetition-num-prefixes", type=int, default=10)
    data.add_argument("--prefix-repetition-output-len", type=int, default=64)
    data.add_argument("--conversation-turns", type=int, default=4)
    data.add_argument("--trace-length-scale", type=float, default=1.0, help="shrink all lengths")
    data.add_argument("--trace-time-scale", type=float, default=1.0, help="replay this much faster")
    data.add_argument("--trace-max-input-len", type=int, default=0)
    add("--slo", default="", metavar="ttft:500ms,tpot:50ms", help="limits that goodput counts")
    add("--goodput", nargs="*", default=[], metavar="METRIC:MS", help="the same, vLLM's form")
    add("--json", metavar="FILE", help="write summary and records; `-`: summary as last line")
    add("--no-progress", action="store_true")


def build_queries(args: argparse.Namespace, seed: datasets.Seed, count: int) -> list[Query]:
    """`count` queries of the dataset that `args` names (0: a whole trace). Raises ValueError for
    arguments or a trace that make no sense, OSError for a trace that cannot be read."""
    vocab = args.vocab_size
    lengths = datasets.Lengths(
        args.random_input_len, args.random_output_len, args.random_range_ratio
    )
    queries: Iterator[Query]
    if args.dataset_name == "trace":
        if args.dataset_path is None:
            raise ValueError("--dataset-name trace needs --dataset-path")
        queries = datasets.trace_queries(
            args.dataset_path,
            vocab,
            seed,
            length_scale=args.trace_length_scale,
            max_input_len=args.trace_max_input_len,
            limit=count,
        )
    elif args.dataset_name == "random":
        queries = datasets.random_queries(count, lengths, vocab, seed, args.random_prefix_len)
    elif args.dataset_name == "prefix_repetition":
        suffix = datasets.Lengths(
            args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
        )
        queries = datasets.prefix_queries(
            count,
            args.prefix_repetition_num_prefixes,
            args.prefix_repetition_prefix_len,
            suffix,
            vocab,
            seed,
        )
    else:
        queries = datasets.conversation_queries(
            count, args.conversation_turns, lengths, vocab, seed
        )
    return list(queries)


def build_plan(args: argparse.Namespace, repeat: int) -> Plan:
    """The queries of one repeat and their due times; another repeat draws other prompts.

    Raises like `build_queries`.
    """
    seed = (args.seed or 0, repeat)
    queries = build_queries(args, (*seed, RUN), args.num_prompts)
    rng = np.random.default_rng((*seed, ARRIVALS))
    count = len(queries)
    due: list[float]
    if args.dataset_name == "trace":
        times = [q.timestamp_ms or 0.0 for q in queries]
        due = arrivals.trace_arrivals(times, args.trace_time_scale, rng)
    elif args.max_concurrency and math.isinf(args.request_rate):
        due = [-math.inf] * count
    elif args.burst_size:
        due = list(arrivals.burst_arrivals(count, args.request_rate, args.burst_size))
    else:
        due = list(arrivals.rate_arrivals(count, args.request_rate, args.burstiness, rng))
    warmups: list[Query] = []
    if args.num_warmups:
        found = build_queries(args, (*seed, WARMUP), args.num_warmups)
        warmups = [dataclasses.replace(query, follows=None) for query in found]
    return Plan(queries, due, args.max_concurrency, args.max_seconds, warmups)


def build_target(args: argparse.Namespace) -> Target:
    base = args.base_url or f"http://{args.host}:{args.port}"
    headers = {"content-type": "application/json"}
    if args.api_key:
        headers["authorization"] = f"Bearer {args.api_key}"
    for item in args.header:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--header {item!r} is not KEY=VALUE")
        headers[name] = value
    extra = json.loads(args.extra_body)
    if args.dataset_name == "conversation":  # the next turn continues the answer
        extra = {"return_token_ids": True, **extra}
    return Target(base.rstrip("/") + args.endpoint, args.model, headers, extra, args.timeout)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that clash, before anything is sent."""
    if args.burst_size and math.isinf(args.request_rate):
        raise ValueError("--burst-size needs a finite --request-rate")
    if args.request_rate <= 0 or args.trace_time_scale <= 0:
        raise ValueError("rates must be above 0")
    if args.num_prompts < (0 if args.dataset_name == "trace" else 1):
        raise ValueError("--num-prompts must be at least 1")
    if args.vocab_size <= datasets.FIRST_TOKEN:
        raise ValueError(f"--vocab-size must be above {datasets.FIRST_TOKEN}")
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
        plan = build_plan(args, 0)
    except (ValueError, OSError) as error:
        print(f"tandem bench serve: error: {error}", file=sys.stderr)
        return 2
    gc.freeze()  # a long plan is many objects: no pause to look through them again
    runs: list[Run] = []
    summaries: list[dict[str, Any]] = []
    for repeat in range(max(1, args.repeats)):
        plan = build_plan(args, repeat) if repeat else plan
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
    """What `--json FILE` holds: the summary at the top level, the arguments but for secrets, and
    one record per request, with times in milliseconds from the start of its run."""
    hidden = ("api_key", "header")
    arguments = {key: str(value) for key, value in vars(args).items() if key not in hidden}
    return {
        **summary,
        "arguments": arguments,
        "records": [[_record(r, one.records[0].due) for r in one.records] for one in runs],
    }


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
