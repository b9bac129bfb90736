"""What requests ask: prompts in token ids and output lengths, made deterministically from a seed.

No tokenizer, Hub or network is needed: prompts are random token ids that `/v1/completions`
accepts, so that lengths are exact and prefixes are shared exactly where a dataset says so.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIRST_TOKEN = 3
"""Ids below are special tokens in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Query:
    """One request of a dataset.

    timestamp_ms: recorded arrival (traces), else None. follows: number of the query whose prompt
    and answer this one continues (conversations), else None; `tokens` is then only the new turn.
    """

    tokens: tuple[int, ...]
    output_len: int
    timestamp_ms: float | None = None
    follows: int | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Input and output lengths in tokens, uniform within `range_ratio` of the mean."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        def one(mean: int) -> int:
            low, high = round(mean * (1 - self.range_ratio)), round(mean * (1 + self.range_ratio))
            return max(1, int(rng.integers(low, high + 1)))

        return one(self.input_len), one(self.output_len)


def random_tokens(rng: np.random.Generator, count: int, vocab_size: int) -> tuple[int, ...]:
    result: list[int] = rng.integers(FIRST_TOKEN, vocab_size, count).tolist()
    return tuple(result)


def random_queries(
    count: int, lengths: Lengths, vocab_size: int, rng: np.random.Generator, prefix_len: int = 0
) -> Iterator[Query]:
    """Independent prompts; the first `prefix_len` tokens are common to all."""
    prefix = random_tokens(rng, prefix_len, vocab_size)
    for _ in range(count):
        input_len, output_len = lengths.draw(rng)
        yield Query(prefix + random_tokens(rng, input_len, vocab_size), output_len)


def prefix_queries(
    count: int,
    num_prefixes: int,
    prefix_len: int,
    suffix: Lengths,
    vocab_size: int,
    rng: np.random.Generator,
) -> Iterator[Query]:
    """`num_prefixes` groups that share a prefix, each prompt with a suffix of its own."""
    prefixes = [random_tokens(rng, prefix_len, vocab_size) for _ in range(num_prefixes)]
    for _ in range(count):
        prefix = prefixes[int(rng.integers(num_prefixes))]
        suffix_len, output_len = suffix.draw(rng)
        yield Query(prefix + random_tokens(rng, suffix_len, vocab_size), output_len)


def conversation_queries(
    count: int, turns: int, lengths: Lengths, vocab_size: int, rng: np.random.Generator
) -> Iterator[Query]:
    """Conversations of `turns` turns, interleaved: each turn continues the one before it."""
    conversations = -(-count // turns)
    for i in range(count):
        turn = i // conversations
        input_len, output_len = lengths.draw(rng)
        follows = None if turn == 0 else i - conversations
        yield Query(random_tokens(rng, input_len, vocab_size), output_len, follows=follows)


def trace_queries(
    path: Path,
    vocab_size: int,
    seed: int,
    *,
    length_scale: float = 1.0,
    block_tokens: int = 512,
    max_input_len: int = 0,
    limit: int = 0,
) -> Iterator[Query]:
    """Requests of a Mooncake-format trace (jsonl, optionally gzip), with its prefix structure.

    Each `hash_ids` entry names a block of `block_tokens` tokens including its whole prefix; it
    becomes `block_tokens * length_scale` tokens that depend on the id alone, so equal prefixes of
    the trace are equal prefixes here. `length_scale` shrinks lengths for small models;
    `max_input_len` (0: none) cuts longer prompts. Raises ValueError for a malformed row.
    """
    block = max(1, round(block_tokens * length_scale))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        for number, line in enumerate(file):
            if limit and number >= limit:
                return
            try:
                row = json.loads(line)
                input_len = max(1, round(int(row["input_length"]) * length_scale))
                output_len = max(1, round(int(row["output_length"]) * length_scale))
                timestamp = float(row["timestamp"])
                ids = [int(i) for i in row.get("hash_ids") or ()]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number + 1}: {error!r}") from error
            if max_input_len:
                input_len = min(input_len, max_input_len)
            tokens: list[int] = []
            for hash_id in ids[: -(-input_len // block)]:
                tokens.extend(
                    random_tokens(np.random.default_rng((seed, 1, hash_id)), block, vocab_size)
                )
            if len(tokens) < input_len:
                own = np.random.default_rng((seed, 2, number))
                tokens.extend(random_tokens(own, input_len - len(tokens), vocab_size))
            yield Query(tuple(tokens[:input_len]), output_len, timestamp_ms=timestamp)
