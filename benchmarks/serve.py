"""`tandem bench serve`: measure an OpenAI-compatible server.

    python -m benchmarks.serve --base-url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200

Flags are named as in `vllm bench serve` where they exist. The last line of the output is the
summary as one JSON object if `--json -` is given.
"""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arrivals, datasets, stats
from benchmarks.client import Target
from benchmarks.run import Plan, Run, run

DATASETS = ("random", "prefix_repetition", "conversation", "trace")


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
    load.add_argument("--num-prompts", type=int, default=200)
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
    load.add_argument("--num-warmups", type=int, default=0)
    load.add_argument("--max-seconds", type=float, default=0.0, help="cut the run; 0: no limit")
    load.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    load.add_argument("--repeats", type=int, default=1, help="runs, for confidence intervals")
    load.add_argument("--seed", type=int, default=0)
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


def build_plan(args: argparse.Namespace, repeat: int) -> Plan:
    """The queries of one repeat and their due times; another repeat draws other prompts."""
    seed = args.seed + repeat
    rng = np.random.default_rng(seed)
    count, vocab = args.num_prompts, args.vocab_size
    lengths = datasets.Lengths(
        args.random_input_len, args.random_output_len, args.random_range_ratio
    )
    if args.dataset_name == "trace":
        if args.dataset_path is None:
            raise ValueError("--dataset-name trace needs --dataset-path")
        queries = list(
            datasets.trace_queries(
                args.dataset_path,
                vocab,
                seed,
                length_scale=args.trace_length_scale,
                max_input_len=args.trace_max_input_len,
                limit=count,
            )
        )
        times = [q.timestamp_ms or 0.0 for q in queries]
        due = arrivals.trace_arrivals(times, args.trace_time_scale, rng)
        return Plan(queries, due, args.max_concurrency, args.max_seconds)
    if args.dataset_name == "random":
        queries = list(datasets.random_queries(count, lengths, vocab, rng, args.random_prefix_len))
    elif args.dataset_name == "prefix_repetition":
        suffix = datasets.Lengths(
            args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
        )
        queries = list(
            datasets.prefix_queries(
                count,
                args.prefix_repetition_num_prefixes,
                args.prefix_repetition_prefix_len,
                suffix,
                vocab,
                rng,
            )
        )
    else:
        queries = list(
            datasets.conversation_queries(count, args.conversation_turns, lengths, vocab, rng)
        )
    if args.burst_size:
        due = list(arrivals.burst_arrivals(count, args.request_rate, args.burst_size))
    else:
        due = list(arrivals.rate_arrivals(count, args.request_rate, args.burstiness, rng))
    return Plan(queries, due, args.max_concurrency, args.max_seconds)


def build_target(args: argparse.Namespace) -> Target:
    base = args.base_url or f"http://{args.host}:{args.port}"
    headers = {"content-type": "application/json"}
    if args.api_key:
        headers["authorization"] = f"Bearer {args.api_key}"
    headers.update(item.split("=", 1) for item in args.header)
    extra = json.loads(args.extra_body)
    return Target(base.rstrip("/") + args.endpoint, args.model, headers, extra, args.timeout)


def report(
    args: argparse.Namespace, runs: Sequence[Run], summaries: Sequence[dict[str, Any]]
) -> None:
    summary = dict(summaries[0])
    if len(summaries) > 1:
        for key, value in summaries[0].items():
            if isinstance(value, float):
                summary[key] = float(np.mean([s[key] for s in summaries]))
        for key in ("completed", "errors", "rejected"):
            summary[key] = sum(s[key] for s in summaries)
        summary["confidence_95"] = stats.intervals(summaries)
        summary["repeats"] = len(summaries)
    print(stats.table(summary))
    failures = [r.error for one in runs for r in one.records if r.error]
    for message in sorted(set(failures))[:5]:
        print(f"error ({failures.count(message)}x): {message}")
    if args.json == "-":
        print(json.dumps(summary))
    elif args.json:
        records = [[asdict(r) for r in one.records] for one in runs]
        for record in (r for one in records for r in one):
            del record["token_ids"]
        arguments = {key: str(value) for key, value in vars(args).items() if key != "api_key"}
        document = {**summary, "arguments": arguments, "records": records}
        Path(args.json).write_text(json.dumps(document))


def bench(args: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code: 1 if no request completed or arguments clash."""
    try:
        slo = stats.parse_slo(args.slo) | stats.parse_slo(" ".join(args.goodput))
        target = build_target(args)
        plans = [build_plan(args, repeat) for repeat in range(max(1, args.repeats))]
        if args.burst_size and math.isinf(args.request_rate):
            raise ValueError("--burst-size needs a finite --request-rate")
    except (ValueError, OSError) as error:
        print(f"bench serve: {error}", file=sys.stderr)
        return 1
    runs: list[Run] = []
    for plan in plans:
        try:
            runs.append(
                asyncio.run(
                    run(target, plan, warmups=args.num_warmups, progress=not args.no_progress)
                )
            )
        except ConnectionError as error:
            print(f"bench serve: {error}", file=sys.stderr)
            return 1
    summaries = [stats.summarize(one.records, slo, one.cpu_share) for one in runs]
    report(args, runs, summaries)
    return 0 if any(s["completed"] for s in summaries) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem bench serve", description=__doc__)
    add_arguments(parser)
    return bench(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
