"""The loads of a comparison: fixed prompts and lengths in closed loops, and prompts beside decode.

Names say streams, input and output tokens: `8x32/256` is 8 streams of 32 tokens in, 256 out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks import datasets, stats
from benchmarks.client import Target
from benchmarks.compare.mix import Mix, run_mix
from benchmarks.run import Plan, run

Figures = Mapping[str, float]
"""What one load measured, by the names of `Column.key`."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a load in the table."""

    key: str
    label: str
    higher_is_better: bool = False


TPOT = Column("median_tpot_ms", "TPOT ms")
TTFT = Column("median_ttft_ms", "TTFT ms")
OUTPUT = Column("output_throughput", "tok/s", True)
ITL99 = Column("p99_itl_ms", "ITL p99 ms")
PROMPT = Column("input_throughput", "prompt tok/s", True)
DECODE = Column("decode_throughput", "decode tok/s", True)


@dataclass(frozen=True, slots=True)
class Closed:
    """`streams` requests at any time, `requests` in all, after one of each stream to warm up."""

    name: str
    streams: int
    requests: int
    input_len: int
    output_len: int
    columns: tuple[Column, ...]

    def shortened(self) -> "Closed":
        """A load of the same kind that takes seconds: it proves that everything works."""
        streams = min(self.streams, 4)
        return replace(
            self,
            streams=streams,
            requests=streams,
            input_len=min(self.input_len, 256),
            output_len=min(self.output_len, 12),
        )


Load = Closed | Mix

LOADS: tuple[Load, ...] = (
    Closed("c1", 1, 5, 128, 64, (TPOT, TTFT)),
    Closed("8x32/256", 8, 8, 32, 256, (TPOT, OUTPUT, ITL99)),
    Closed("32x32/256", 32, 32, 32, 256, (TPOT, OUTPUT, ITL99)),
    Closed("8x256/64", 8, 16, 256, 64, (TPOT, OUTPUT)),
    Closed("pf", 2, 8, 2048, 8, (PROMPT, TTFT)),
    Mix(
        "mix", streams=4, input_len=128, output_len=512, prompt_len=2048, prompt_output_len=8,
        every_s=5.0, seconds=60.0, columns=(ITL99, DECODE, TTFT),
    ),
)  # fmt: skip


async def measure(load: Load, target: Target, vocab_size: int, seed: datasets.Seed) -> Figures:
    """Run one load against a server. Raises ConnectionError if a request fails: figures of a
    server that drops requests are not comparable."""
    if isinstance(load, Mix):
        return await run_mix(load, target, vocab_size, seed)
    lengths = datasets.Lengths(load.input_len, load.output_len)
    queries = list(datasets.random_queries(load.requests, lengths, vocab_size, (*seed, 0)))
    short = datasets.Lengths(load.input_len, min(load.output_len, 8))
    warmups = list(datasets.random_queries(load.streams, short, vocab_size, (*seed, 1)))
    plan = Plan(queries, [-math.inf] * len(queries), load.streams, 0.0, warmups)
    result = await run(target, plan, progress=False)
    errors = [record.error for record in result.records if record.error]
    if errors:
        raise ConnectionError(f"{load.name}: {len(errors)} requests failed: {errors[0]}")
    summary = stats.summarize(result, {})
    summary["input_throughput"] = summary["total_input_tokens"] / summary["duration_s"]
    keys = [column.key for column in load.columns]
    return {key: summary[key] for key in (*keys, "client_cpu", "cached_tokens")}


def chosen(names: Sequence[str]) -> list[Load]:
    """Loads by name, in the order of the table. Raises ValueError for an unknown name."""
    known = {load.name: load for load in LOADS}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"no load {wrong[0]!r}; there are {', '.join(known)}")
    return [load for load in LOADS if load.name in names]
