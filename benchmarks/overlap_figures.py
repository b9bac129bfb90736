"""What `benchmarks.overlap` found: from times and diaries to figures and sentences."""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from benchmarks.overlap_worker import Diary, EngineStep

ITLS: Final = 1.5
SLACK_S: Final = 0.015
"""Token 2 should come at most ITLS * ITL + SLACK_S after token 1."""
HELD: Final = 0.7


@dataclass(slots=True)
class Stream:
    """One request: when it was sent and when its tokens came."""

    number: int
    sent: float
    times: list[float] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    failed: str = ""

    @property
    def gap_s(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def itl_s(self) -> float:
        """The median of the later gaps."""
        return float(np.median(np.diff(self.times[1:])))


@dataclass(slots=True)
class Turn:
    """Some seconds of decode steps."""

    begin: float
    end: float
    gbps: float


@dataclass(slots=True)
class Measured:
    """What was done; the diaries of the workers say the rest."""

    alone: list[Stream] = field(default_factory=list)
    idle: list[Stream] = field(default_factory=list)
    paced: list[Stream] = field(default_factory=list)
    paced_rate: float = 0.0
    """Share of what the saturated decode worker writes."""
    busy: list[Stream] = field(default_factory=list)
    quiet: list[Turn] = field(default_factory=list)
    flooded: list[Turn] = field(default_factory=list)
    unshipped: list[Turn] = field(default_factory=list)
    """The prefill worker computes, and ships nothing."""
    shipped: list[Turn] = field(default_factory=list)


def figures(done: Measured, prefill: Diary, decode: Diary, num_streams: int) -> dict[str, Any]:
    """What came out, in milliseconds and shares. `num_streams`: that keep the decode worker
    busy."""
    alone = [_prefill_s(stream, prefill.steps) for stream in done.alone]
    shipped = [_prefill_s(stream, prefill.steps) for stream in done.idle]
    held = [_held(stream, prefill, decode) for stream in done.idle]
    return {
        "idle": _gaps(done.idle),
        "busy": _gaps(done.busy),
        "paced": _gaps(done.paced) | {"decode_rate": round(done.paced_rate, 3)},
        "held": {
            "share_when_last_chunk_starts": round(statistics.median(h[0] for h in held), 3),
            "ms_until_70_percent": round(statistics.median(h[1] for h in held) * 1e3, 2),
            "last_chunk_ms": round(statistics.median(h[2] for h in held) * 1e3, 1),
        },
        "prefill": {
            "alone_s": round(statistics.median(alone), 4),
            "shipped_s": round(statistics.median(shipped), 4),
            "ratio": round(
                statistics.median(s / a for s, a in zip(shipped, alone, strict=True)), 4
            ),
        },
        "exposed_ms": round(prefill.exposed_ms, 2),
        "steps": {
            "flood": _compared(done.quiet, done.flooded, decode.steps, num_streams),
            "worker": _compared(done.unshipped, done.shipped, decode.steps, num_streams),
        },
    }


def _gaps(streams: Sequence[Stream]) -> dict[str, float]:
    limits = [ITLS * stream.itl_s + SLACK_S for stream in streams]
    met = [stream.gap_s <= limit for stream, limit in zip(streams, limits, strict=True)]
    return {
        "itl_ms": round(statistics.median(stream.itl_s for stream in streams) * 1e3, 2),
        "gap_ms_p50": round(statistics.median(stream.gap_s for stream in streams) * 1e3, 2),
        "gap_ms_max": round(max(stream.gap_s for stream in streams) * 1e3, 2),
        "limit_ms": round(statistics.median(limits) * 1e3, 2),
        "share_within": sum(met) / len(met),
    }


def _chunks(stream: Stream, steps: Sequence[EngineStep]) -> list[EngineStep]:
    """The steps that computed the prompt of a stream, which was alone there."""
    return [step for step in steps if stream.sent <= step.begin and step.end <= stream.times[0]]


def _prefill_s(stream: Stream, steps: Sequence[EngineStep]) -> float:
    chunks = _chunks(stream, steps)
    return chunks[-1].end - chunks[0].begin


def _held(stream: Stream, prefill: Diary, decode: Diary) -> tuple[float, float, float]:
    """Share of the blocks that have landed when the last chunk starts, seconds from then until
    HELD of them have, and seconds of that chunk."""
    last = _chunks(stream, prefill.steps)[-1]
    landed = [arrival for arrival in decode.arrivals if arrival.request == stream.number]
    total = sum(arrival.num_blocks for arrival in landed)
    before = sum(arrival.num_blocks for arrival in landed if arrival.at <= last.begin)
    count = 0
    until_s = 0.0
    for arrival in landed:
        count += arrival.num_blocks
        if count >= HELD * total:
            until_s = max(0.0, arrival.at - last.begin)
            break
    return before / total, until_s, last.end - last.begin


def _compared(
    without: Sequence[Turn], among: Sequence[Turn], steps: Sequence[EngineStep], num_streams: int
) -> dict[str, Any]:
    """The decode worker's steps in turns without blocks coming in and with them."""
    quiet, loaded = (_step_ms(turns, steps, num_streams) for turns in (without, among))
    ratio = float(np.percentile(loaded, 99) / np.percentile(quiet, 99))
    return {
        "mbps": round(statistics.median(turn.gbps for turn in among) * 1e3, 1),
        "without": _percentiles(quiet),
        "with": _percentiles(loaded),
        "p99_ratio": round(ratio, 4),
    }


def _step_ms(turns: Sequence[Turn], steps: Sequence[EngineStep], num_streams: int) -> list[float]:
    """Of the steps of these turns that computed one token of each stream."""
    return [
        (step.end - step.begin) * 1e3
        for step in steps
        if step.num_rows == step.num_tokens == num_streams
        and any(turn.begin <= step.begin and step.end <= turn.end for turn in turns)
    ]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    found = {f"p{part}_ms": round(float(np.percentile(values, part)), 3) for part in (50, 99)}
    return found | {"steps": len(values)}


def report(found: dict[str, Any]) -> str:
    """The figures beside what is wanted of them."""
    lines = []
    for name, what in (
        ("idle", "idle"),
        ("paced", f"{found['paced']['decode_rate']:.0%} busy"),
        ("busy", "saturated"),
    ):
        gaps = found[name]
        lines.append(
            f"{what} decode worker: token 2 comes {gaps['gap_ms_p50']} ms after token 1 (worst "
            f"{gaps['gap_ms_max']}), ITL {gaps['itl_ms']}; within {ITLS} ITL + "
            f"{SLACK_S * 1e3:.0f} ms: {gaps['share_within']:.0%}"
        )
    held, prefill = found["held"], found["prefill"]
    lines.append(
        f"held when the last chunk starts: {held['share_when_last_chunk_starts']:.0%} of the "
        f"blocks, 70 % {held['ms_until_70_percent']} ms later; that chunk takes "
        f"{held['last_chunk_ms']} ms; exposed after the last one {found['exposed_ms']} ms"
    )
    lines.append(
        f"prefill: {prefill['alone_s']} s alone, {prefill['shipped_s']} s shipped, ratio "
        f"{prefill['ratio']} (at most 1.03)"
    )
    for name, what in (("worker", "from a prefill worker"), ("flood", "as fast as it can")):
        steps = found["steps"][name]
        lines.append(
            f"decode step p99: {steps['without']['p99_ms']} ms without, {steps['with']['p99_ms']} "
            f"ms with {steps['mbps']} MB/s {what}, ratio {steps['p99_ratio']} (at most 1.03)"
        )
    return "\n".join(lines)
