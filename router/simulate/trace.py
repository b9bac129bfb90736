"""The requests of a simulation: Mooncake-format traces, or synthetic sessions.

A trace is JSON lines, gzipped or not: `timestamp` (ms), `input_length`, `output_length` and,
optionally, `hash_ids`: chained ids of the prompt's blocks, the last one partial.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from common.blockhash import BlockHash
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Request:
    arrival: float
    """Seconds from the start of the trace."""
    prompt: int
    """Tokens."""
    output: int
    """Tokens, at least 1."""
    blocks: tuple[BlockHash, ...]
    """Names of the prompt's blocks, in order; empty if nothing is known of them."""


def load(source: str) -> list[Request]:
    """The requests of a trace file, or of `synthetic[:name=value,...]`. Raises ConfigError."""
    if source == "synthetic" or source.startswith("synthetic:"):
        return _synthetic(source.partition(":")[2])
    path = Path(source)
    opener = gzip.open if path.suffix == ".gz" else open
    names: dict[int, BlockHash] = {}
    requests: list[Request] = []
    try:
        with opener(path, "rt") as file:
            for line in file:
                if line.strip():
                    requests.append(_request(json.loads(line), names))
    except (OSError, EOFError) as error:
        raise ConfigError(f"trace {source}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"trace {source}, request {len(requests) + 1}: {error!r}") from None
    if not requests:
        raise ConfigError(f"trace {source}: no requests")
    requests.sort(key=lambda request: request.arrival)
    return requests


def _request(row: Any, names: dict[int, BlockHash]) -> Request:
    blocks = []
    for i in row.get("hash_ids", ()):
        name = names.get(i)
        if name is None:
            name = names[i] = BlockHash(int(i).to_bytes(16, "little"))
        blocks.append(name)
    prompt, output = int(row["input_length"]), int(row["output_length"])
    if prompt < 1:
        raise ValueError("input_length must be at least 1")
    return Request(float(row["timestamp"]) / 1000, prompt, max(1, output), tuple(blocks))


def _synthetic(text: str) -> list[Request]:
    """Sessions of several turns, each turn's prompt all of the turn before and its answer.

    Poisson arrivals of sessions, exponential think times and lengths. Values and their defaults:
    requests=2000, rate=4 (requests/s), turns=4, input=2000 (new tokens per turn), output=200,
    think=20 (s), shared=1 (blocks that all prompts begin with), block=512 (tokens), seed=0.
    """
    values = {
        "requests": 2000.0, "rate": 4.0, "turns": 4.0, "input": 2000.0, "output": 200.0,
        "think": 20.0, "shared": 1.0, "block": 512.0, "seed": 0.0,
    }  # fmt: skip
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            if name not in values or (number := float(value)) < 0:
                raise ValueError
        except ValueError:
            expected = ", ".join(values)
            raise ConfigError(f"trace synthetic: {part!r}: expected {expected}") from None
        values[name] = number
    if not all(values[name] >= 1 for name in ("requests", "turns", "input", "output", "block")):
        raise ConfigError("trace synthetic: requests, turns, input, output and block are >= 1")
    if not values["rate"]:
        raise ConfigError("trace synthetic: rate must be positive")
    rng = Random(values["seed"])
    block = int(values["block"])
    shared = int(values["shared"])
    requests: list[Request] = []
    start, count = 0.0, 0
    while len(requests) < values["requests"]:
        start += rng.expovariate(values["rate"] / values["turns"])
        at, history = start, shared * block
        chain = [BlockHash(i.to_bytes(16, "little")) for i in range(shared)]
        for _ in range(int(values["turns"])):
            prompt = history + 1 + int(rng.expovariate(1 / values["input"]))
            output = 1 + int(rng.expovariate(1 / values["output"]))
            while len(chain) * block < prompt + output:
                chain.append(BlockHash((shared + count).to_bytes(16, "little")))
                count += 1
            # A partial block has a name of its own: the next turn fills it otherwise.
            full = chain[: prompt // block]
            requests.append(Request(at, prompt, output, tuple(full)))
            history = prompt + output
            at += rng.expovariate(1 / values["think"]) if values["think"] else 0.0
    requests.sort(key=lambda request: request.arrival)
    return requests[: int(values["requests"])]


def arrivals(requests: Sequence[Request], rate_scale: float, rng: Random) -> list[float]:
    """When each request arrives if all comes `rate_scale` times as fast, ascending.

    Requests that share a timestamp (a coarse clock) are spread evenly at random up to the next
    one.
    """
    result: list[float] = []
    start = 0
    for end in range(1, len(requests) + 1):
        if end < len(requests) and requests[end].arrival == requests[start].arrival:
            continue
        at = requests[start].arrival
        if end - start > 1 and end < len(requests):
            width = requests[end].arrival - at
            result.extend(sorted(at + width * rng.random() for _ in range(start, end)))
        else:
            result.extend([at] * (end - start))
        start = end
    return [at / rate_scale for at in result]


def rate(requests: Iterable[Request]) -> float:
    """Requests per second of a trace as it is; infinite if all come at once."""
    times = [request.arrival for request in requests]
    span = times[-1] - times[0]
    return len(times) / span if span > 0 else float("inf")
