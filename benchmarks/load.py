"""What a load is: the flags that `tandem bench serve` and `sweep` share, made to plans.

Flags are named as in `vllm bench serve` where they exist there.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import arrivals, datasets
from benchmarks.client import Target
from benchmarks.datasets import Query
from benchmarks.run import Plan

DATASETS = ("random", "prefix_repetition", "conversation", "trace")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
VOCAB_SIZE = 256
"""Without a tokenizer: most vocabularies begin with the bytes, after a few special tokens."""
RUN, ARRIVALS, WARMUP = range(3)
"""Streams of randomness that one seed gives."""


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("requests").add_argument
    add("--backend", choices=tuple(ENDPOINTS), default="openai", help="completions or chat")
    add("--endpoint", help="path of the endpoint; none: that of --backend")
    add(
        "--tokenizer",
        metavar="DIR_OR_ID",
        help="send prompts as text of random tokens of this tokenizer; none: send token ids",
    )
    add("--api-key", help="sent as a Bearer token")
    add("--header", action="append", default=[], metavar="KEY=VALUE")
    add("--extra-body", default="{}", help="JSON object added to every request")
    add("--timeout", type=float, default=600.0, help="seconds for one request")


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("arrivals").add_argument
    add("--burstiness", type=float, default=1.0, help="1: Poisson; below: burstier; inf: fixed")
    add("--max-concurrency", type=int, default=0, help="requests in flight; 0: no limit")
    add("--num-warmups", type=int, default=0, help="requests before a run, with other prompts")
    add("--seed", type=int, help="none: a fresh one, so that no earlier run warmed the caches")
    add = parser.add_argument_group("dataset").add_argument
    add("--dataset-name", choices=DATASETS, default="random")
    add("--dataset-path", type=Path, help="trace: Mooncake-format jsonl[.gz]")
    add("--vocab-size", type=int, help="token ids are below this; none: the tokenizer's, or 256")
    add("--random-input-len", type=int, default=256)
    add("--random-output-len", type=int, default=64)
    add("--random-range-ratio", type=float, default=0.0)
    add("--random-prefix-len", type=int, default=0)
    add("--prefix-repetition-prefix-len", type=int, default=256)
    add("--prefix-repetition-suffix-len", type=int, default=64)
    add("--prefix-repetition-num-prefixes", type=int, default=10)
    add("--prefix-repetition-output-len", type=int, default=64)
    add("--conversation-turns", type=int, default=4)
    add("--trace-length-scale", type=float, default=1.0, help="multiplies all lengths")
    add("--trace-time-scale", type=float, default=1.0, help="replay this much faster")
    add("--trace-max-input-len", type=int, default=0, help="cut longer prompts; 0: none")
    add("--trace-max-output-len", type=int, default=0, help="cut longer answers; 0: none")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that clash, before anything is sent."""
    if args.burst_size and math.isinf(args.request_rate):
        raise ValueError("--burst-size needs a finite --request-rate")
    if args.request_rate <= 0 or args.trace_time_scale <= 0 or args.trace_length_scale <= 0:
        raise ValueError("rates and scales must be above 0")
    if args.burstiness <= 0:
        raise ValueError("--burstiness must be above 0")
    if args.num_prompts < (0 if args.dataset_name == "trace" else 1):
        raise ValueError("--num-prompts must be at least 1")
    if args.dataset_name == "trace" and args.dataset_path is None:
        raise ValueError("--dataset-name trace needs --dataset-path")
    if args.vocab_size is not None and args.vocab_size <= datasets.FIRST_TOKEN:
        raise ValueError(f"--vocab-size must be above {datasets.FIRST_TOKEN}")
    if args.backend == "openai-chat" and not args.tokenizer:
        raise ValueError("--backend openai-chat takes text: it needs --tokenizer")


def load_tokenizer(name: str) -> Tokenizer:
    """That of a checkpoint directory, or of a Hub id. Raises ValueError if there is none."""
    try:
        directory = Path(name)
        if directory.is_dir():
            return Tokenizer.from_file(str(directory / "tokenizer.json"))
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"--tokenizer {name}: {error}") from error


def target(args: argparse.Namespace, base_url: str, model: str | None) -> Target:
    """Where and how requests are sent. Raises ValueError."""
    headers = {"content-type": "application/json"}
    if args.api_key:
        headers["authorization"] = f"Bearer {args.api_key}"
    for item in args.header:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--header {item!r} is not KEY=VALUE")
        headers[name] = value
    extra = json.loads(args.extra_body)
    if not isinstance(extra, dict):
        raise ValueError("--extra-body is not a JSON object")
    if args.dataset_name == "conversation":  # the next turn continues the answer
        extra = {"return_token_ids": True, **extra}
    path = args.endpoint or ENDPOINTS[args.backend]
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    return Target(
        base_url.rstrip("/") + path, model, headers, extra, args.timeout,
        tokenizer, args.backend == "openai-chat",
    )  # fmt: skip


def queries(args: argparse.Namespace, seed: datasets.Seed, count: int) -> list[Query]:
    """`count` queries of the dataset that `args` names (0: a whole trace). Raises ValueError for
    arguments or a trace that make no sense, OSError for a trace that cannot be read."""
    vocab = args.vocab_size or VOCAB_SIZE
    lengths = datasets.Lengths(
        args.random_input_len, args.random_output_len, args.random_range_ratio
    )
    found: Iterator[Query]
    if args.dataset_name == "trace":
        found = datasets.trace_queries(
            args.dataset_path, vocab, seed, length_scale=args.trace_length_scale,
            max_input_len=args.trace_max_input_len, max_output_len=args.trace_max_output_len,
            limit=count,
        )  # fmt: skip
    elif args.dataset_name == "random":
        found = datasets.random_queries(count, lengths, vocab, seed, args.random_prefix_len)
    elif args.dataset_name == "prefix_repetition":
        suffix = datasets.Lengths(
            args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
        )
        found = datasets.prefix_queries(
            count, args.prefix_repetition_num_prefixes, args.prefix_repetition_prefix_len,
            suffix, vocab, seed,
        )  # fmt: skip
    else:
        found = datasets.conversation_queries(count, args.conversation_turns, lengths, vocab, seed)
    return list(found)


def plan(args: argparse.Namespace, repeat: int) -> Plan:
    """The queries of one repeat and their due times; another repeat draws other prompts.

    Raises like `queries`.
    """
    seed = (args.seed or 0, repeat)
    found = queries(args, (*seed, RUN), args.num_prompts)
    rng = np.random.default_rng((*seed, ARRIVALS))
    count = len(found)
    due: list[float]
    if args.dataset_name == "trace":
        times = [q.timestamp_ms or 0.0 for q in found]
        due = arrivals.trace_arrivals(times, args.trace_time_scale, rng)
    elif args.max_concurrency and math.isinf(args.request_rate):
        due = [-math.inf] * count
    elif args.burst_size:
        due = list(arrivals.burst_arrivals(count, args.request_rate, args.burst_size))
    else:
        due = list(arrivals.rate_arrivals(count, args.request_rate, args.burstiness, rng))
    warmups: list[Query] = []
    if args.num_warmups:
        drawn = queries(args, (*seed, WARMUP), args.num_warmups)
        warmups = [dataclasses.replace(query, follows=None) for query in drawn]
    return Plan(found, due, args.max_concurrency, args.max_seconds, warmups)
