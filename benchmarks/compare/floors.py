"""The floors of a comparison: the least time that its loads can take on the machine of the run.

A step takes at least as long as reading every weight and the KV cache at the measured bandwidth,
and as multiplying them at the measured rate of a large product; a load at least as long as its
prompts and steps, one after the other, when nothing else costs anything. The rates are those of
`benchmarks.rates`, measured before and after the systems of the same run.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.compare.checkpoints import Shape
from benchmarks.compare.loads import DECODE, OUTPUT, PROMPT, TPOT, TTFT, Closed, Load
from benchmarks.compare.mix import Mix
from benchmarks.compare.paths import ROOT

BF16_BYTES = 2
RATES = ("read_gb_s", "gemm_gflop_s", "int8_gop_s")


def measured(cores: Sequence[int]) -> dict[str, Any]:
    """What `benchmarks.rates` says of these cores. Raises CalledProcessError."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.rates", ",".join(map(str, cores))],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def averaged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of the rates of several runs of `measured`."""
    means = {
        part: {name: mean(run[part][name] for run in runs) for name in RATES}
        for part in ("all", "one")
    }
    return {"cores": runs[0]["cores"], **means}


@dataclass(frozen=True, slots=True)
class Engine:
    """The floors of one checkpoint with weights of one kind on some cores."""

    shape: Shape
    bandwidth: float
    """Bytes per second."""
    linear_rate: float
    """Operations per second of the products with weights, in what the weights are held in."""
    attention_rate: float
    """The same of attention, which is in bfloat16 always."""
    weight_bytes: int
    """Of one weight."""

    @property
    def body(self) -> int:
        """Weights of all layers that a token is multiplied with."""
        s = self.shape
        head_dim = s.hidden // s.heads
        attention = s.hidden * head_dim * (2 * s.heads + 2 * s.kv_heads)
        return s.layers * (attention + 3 * s.hidden * s.intermediate)

    @property
    def head(self) -> int:
        return self.shape.vocab_size * self.shape.hidden

    def attention_flops(self, pairs: float) -> float:
        """Of `pairs` of a query's and a key's position."""
        return 4.0 * pairs * self.shape.hidden * self.shape.layers

    def decode_s(self, streams: int, context: float) -> float:
        """One step of `streams` sequences of `context` tokens each."""
        s = self.shape
        kv = 2 * s.layers * s.kv_heads * (s.hidden // s.heads) * BF16_BYTES * context * streams
        reading = ((self.body + self.head) * self.weight_bytes + kv) / self.bandwidth
        linear = 2.0 * streams * (self.body + self.head) / self.linear_rate
        return max(reading, linear + self.attention_flops(streams * context) / self.attention_rate)

    def prompt_s(self, tokens: int) -> float:
        """One prompt alone; its last token is the only one that needs the head."""
        reading = (self.body + self.head) * self.weight_bytes / self.bandwidth
        linear = 2.0 * (tokens * self.body + self.head) / self.linear_rate
        pairs = tokens * (tokens + 1) / 2
        return max(reading, linear + self.attention_flops(pairs) / self.attention_rate)


def engine(shape: Shape, quantize: str, rates: Mapping[str, Any], part: str) -> Engine:
    """part: `all` the cores together, or `one` of them beside the others.

    Some products gain little from a second thread: the rate of all cores is at least that of as
    many single ones, each busy with its own.
    """
    many = rates["cores"] if part == "all" else 1
    best = {name: max(rates[part][name], many * rates["one"][name]) for name in RATES[1:]}
    return Engine(
        shape=shape,
        bandwidth=rates[part]["read_gb_s"] * 1e9,
        linear_rate=best["int8_gop_s" if quantize else "gemm_gflop_s"] * 1e9,
        attention_rate=best["gemm_gflop_s"] * 1e9,
        weight_bytes=1 if quantize else BF16_BYTES,
    )


def closed(load: Closed, machine: Engine) -> dict[str, float]:
    """By the keys of its columns: milliseconds, tokens per second."""
    waves = load.requests / load.streams
    steps = load.output_len - 1
    step = machine.decode_s(load.streams, load.input_len + load.output_len / 2)
    prompt = machine.prompt_s(load.input_len)
    seconds = waves * (load.streams * prompt + steps * step)
    result = {
        TPOT.key: step * 1e3,
        OUTPUT.key: load.requests * load.output_len / seconds,
        PROMPT.key: load.requests * load.input_len / seconds,
    }
    if load.streams == 1:
        result[TTFT.key] = prompt * 1e3
    return {c.key: result[c.key] for c in load.columns if c.key in result}


def mixed(load: Mix, machine: Engine) -> dict[str, float]:
    """Of one core that decodes and one that reads prompts, both busy."""
    step = machine.decode_s(load.streams, load.input_len + load.output_len / 2)
    prompt = machine.prompt_s(load.prompt_len)
    return {DECODE.key: load.streams / step, TTFT.key: prompt * 1e3}


def floors(
    shape: Shape, quantize: str, rates: Mapping[str, Any], loads: Sequence[Load]
) -> dict[str, dict[str, float]]:
    """By the names of loads and keys of columns; what has no floor is left out."""
    together, one = (engine(shape, quantize, rates, part) for part in ("all", "one"))
    return {
        load.name: mixed(load, one) if isinstance(load, Mix) else closed(load, together)
        for load in loads
    }


def told(rates: Mapping[str, Any]) -> str:
    """The rates in a sentence."""

    def part(name: str) -> str:
        of = rates[name]
        return (
            f"{of['read_gb_s']:.1f} GB/s, {of['gemm_gflop_s']:.0f} GFLOP/s in bf16, "
            f"{of['int8_gop_s']:.0f} GOP/s in int8"
        )

    return (
        f"This run's machine: {rates['cores']} cores together {part('all')}; one core with the "
        f"others busy {part('one')}."
    )
