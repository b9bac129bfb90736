"""What requests ask: prompts in token ids and output lengths, made deterministically from a seed.

No tokenizer, Hub or network is needed: prompts are random token ids that `/v1/completions`
accepts, so that lengths are exact and prefixes are shared exactly where a dataset says so. A query
says how its tokens are drawn; they are drawn when it is sent, since those of a long trace would
fill the memory.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIRST_TOKEN = 3
"""Ids below are special tokens in most vocabularies."""

Seed = tuple[int, ...]
"""Equal seeds make equal queries. Derived seeds append to it."""
_OWN, _SHARED = 0, 1
"""Appended to seeds: tokens of one query, and tokens that several have."""


@dataclass(frozen=True, slots=True)
class Part:
    """`count` token ids, drawn from a generator with this seed: equal parts are equal tokens."""

    seed: Seed
    count: int


@dataclass(frozen=True, slots=True)
class Query:
    """One request of a dataset.

    timestamp_ms: recorded arrival (traces), else None. follows: number of the query whose prompt
    and answer this one continues (conversations), else None; its own tokens are then the new turn.
    """

    parts: tuple[Part, ...]
    input_len: int
    """The parts are cut to this length."""
    output_len: int
    vocab_size: int
    timestamp_ms: float | None = None
    follows: int | None = None

    def tokens(self) -> list[int]:
        """Drawn anew by each call."""
        result: list[int] = []
        for part in self.parts:
            rng = np.random.default_rng(part.seed)
            result.extend(rng.integers(FIRST_TOKEN, self.vocab_size, part.count).tolist())
        return result[: self.input_len]


def _query(
    parts: list[Part], output_len: int, vocab_size: int, follows: int | None = None
) -> Query:
    input_len = sum(part.count for part in parts)
    return Query(tuple(parts), input_len, output_len, vocab_size, follows=follows)


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


def random_queries(
    count: int, lengths: Lengths, vocab_size: int, seed: Seed, prefix_len: int = 0
) -> Iterator[Query]:
    """Independent prompts; the first `prefix_len` tokens are common to all."""
    rng = np.random.default_rng(seed)
    prefix = Part((*seed, _SHARED), prefix_len)
    for i in range(count):
        input_len, output_len = lengths.draw(rng)
        yield _query([prefix, Part((*seed, _OWN, i), input_len)], output_len, vocab_size)


def prefix_queries(
    count: int, num_prefixes: int, prefix_len: int, suffix: Lengths, vocab_size: int, seed: Seed
) -> Iterator[Query]:
    """`num_prefixes` groups that share a prefix, each prompt with a suffix of its own."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        prefix = Part((*seed, _SHARED, int(rng.integers(num_prefixes))), prefix_len)
        suffix_len, output_len = suffix.draw(rng)
        yield _query([prefix, Part((*seed, _OWN, i), suffix_len)], output_len, vocab_size)


def conversation_queries(
    count: int, turns: int, lengths: Lengths, vocab_size: int, seed: Seed
) -> Iterator[Query]:
    """Conversations of `turns` turns, interleaved: each turn continues the one before it."""
    rng = np.random.default_rng(seed)
    conversations = -(-count // turns)
    for i in range(count):
        input_len, output_len = lengths.draw(rng)
        follows = None if i < conversations else i - conversations
        yield _query([Part((*seed, _OWN, i), input_len)], output_len, vocab_size, follows)


def trace_queries(
    path: Path,
    vocab_size: int,
    seed: Seed,
    *,
    length_scale: float = 1.0,
    block_tokens: int = 512,
    max_input_len: int = 0,
    max_output_len: int = 0,
    limit: int = 0,
) -> Iterator[Query]:
    """Requests of a Mooncake-format trace (jsonl, optionally gzip), with its prefix structure.

    Each `hash_ids` entry names a block of `block_tokens` tokens including its whole prefix; it
    becomes `block_tokens * length_scale` tokens that depend on seed and id alone, so equal prefixes
    of the trace are equal prefixes here. `length_scale` shrinks lengths for small models;
    `max_input_len` and `max_output_len` (0: none) cut longer prompts and answers, `limit` (0: none)
    the trace. Raises ValueError for a malformed row or one that is earlier than the row before it.
    """
    block = max(1, round(block_tokens * length_scale))
    opener = gzip.open if path.suffix == ".gz" else open
    before = -float("inf")
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
                if not timestamp >= before:
                    raise ValueError(f"timestamp {timestamp:g} after {before:g}")
                if min(ids, default=0) < 0:
                    raise ValueError("a negative hash id")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number + 1}: {error!r}") from error
            before = timestamp
            if max_input_len:
                input_len = min(input_len, max_input_len)
            if max_output_len:
                output_len = min(output_len, max_output_len)
            parts = [Part((*seed, _SHARED, i), block) for i in ids[: -(-input_len // block)]]
            if (missing := input_len - block * len(parts)) > 0:
                parts.append(Part((*seed, _OWN, number), missing))
            yield Query(tuple(parts), input_len, output_len, vocab_size, timestamp_ms=timestamp)
