"""Does shipping hide behind computing? `python -m benchmarks.overlap [--json FILE] [--quick]`.

A prefill and a decode worker, two processes that compute on one thread each; this process is their
router. What is measured:

gap: from token 1, which the prefill worker sends, to token 2, which the decode worker sends, beside
the time between the later tokens of the stream (ITL); with the decode worker idle and with it busy.
held: the share of a prompt's blocks that the decode worker has when the last chunk starts, and how
long after that until it has 70 % of them.
prefill: from the start of the first chunk to the end of the last one, with and without shipping, in
turns.
steps: of the decode worker, with and without blocks coming in as fast as it takes them, in turns.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks import machine
from benchmarks.compare.checkpoints import checkpoint
from benchmarks.overlap_worker import Diary, EngineStep
from benchmarks.transfer_peer import EventQueue, Pool
from common.blockhash import pack_tokens
from common.config import TRANSPORTS, TimerConfig
from common.link import Down, Message, RouterLink, Up
from common.messages import Admit, Cancel, Failed, Peer, Prefill, Step, WorkerInfo
from common.sampling import SamplingParams
from kvtransfer.commands import BlockRef, Broken, Close, Delivered, First, Key, Offer, Open
from kvtransfer.endpoint import Endpoint
from kvtransfer.identity import EndpointIdentity

SHAPE: Final = "qwen2-0.5b"
ITLS: Final = 1.5
SLACK_S: Final = 0.015
"""Token 2 should come at most ITLS * ITL + SLACK_S after token 1."""
HELD: Final = 0.7
IN_FLIGHT: Final = 8
"""Prompts that are shipped at a time when blocks come in as fast as they can: the engine answers
between two steps only."""
STREAM_PROMPT: Final = 32
"""Tokens of the prompt of a stream that keeps the decode worker busy."""


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    transport: str = "auto"
    prompt_tokens: int = 2048
    """A multiple of the block size."""
    chunk_tokens: int = 512
    outputs: int = 12
    repeats: int = 6
    streams: int = 8
    """That keep the decode worker busy."""
    turns: int = 4
    turn_s: float = 10.0
    kv_blocks: int = 2560


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


class Client:
    """The router of both workers. Every prompt is new, so that nobody has it cached."""

    def __init__(self, plan: Plan, link: RouterLink, workers: dict[str, WorkerInfo]) -> None:
        self.workers = workers
        self._plan = plan
        self._link = link
        self._random = random.Random(1)
        self._streams: dict[int, Stream] = {}

    def peer(self, role: str) -> Peer:
        info = self.workers[role]
        return Peer(info.id, info.epoch, info.kv_address)

    def prefill(self) -> Stream:
        """A prompt that is computed and not shipped."""
        stream, work = self._begin(self._plan.prompt_tokens, 1)
        self._link.send(self.workers["prefill"].id, Prefill(**work))
        return stream

    def serve(self) -> Stream:
        """A prompt that is computed by one worker and continued by the other."""
        stream, work = self._begin(self._plan.prompt_tokens, self._plan.outputs)
        prefill = Prefill(**work, decode=self.peer("decode"))
        self._link.send(self.workers["prefill"].id, prefill)
        self._link.send(self.workers["decode"].id, Admit(**work, prefill=self.peer("prefill")))
        return stream

    def admit(self, source: Peer) -> Stream:
        """A prompt that `source` ships and whose first token is its last."""
        stream, work = self._begin(self._plan.prompt_tokens, 1)
        self._link.send(self.workers["decode"].id, Admit(**work, prefill=source))
        return stream

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """The decode worker has streams to compute for as long as this lasts."""
        most = self.workers["decode"].max_model_len - STREAM_PROMPT
        begun = [self._begin(STREAM_PROMPT, most) for _ in range(self._plan.streams)]
        for _, work in begun:
            self._link.send(self.workers["decode"].id, Admit(**work))
        for stream, _ in begun:
            while not stream.times:
                await asyncio.sleep(0.01)
        yield
        for stream, _ in begun:
            self._link.send(self.workers["decode"].id, Cancel(stream.number, 0))

    async def finished(self, stream: Stream) -> Stream:
        """Raises ConnectionError if a worker gave it up."""
        await stream.over.wait()
        if stream.failed:
            raise ConnectionError(f"a request failed: {stream.failed}")
        del self._streams[stream.number]
        return stream

    async def read(self) -> None:
        """Follow both workers for ever. Raises ConnectionError if one is lost."""
        while True:
            event = await self._link.receive()
            now = monotonic()
            if isinstance(event, Down):
                raise ConnectionError(f"{event.worker_id} is gone: {event.reason}")
            if not isinstance(event, Message):
                continue
            match event.message:
                case Step(outputs):
                    for output in outputs:
                        stream = self._streams.get(output.request)
                        if stream is None:
                            continue
                        if output.index == len(stream.times):
                            stream.times.append(now)
                        if output.finish:
                            stream.over.set()
                case Failed(number, _, reason, detail) if number in self._streams:
                    self._streams[number].failed = f"{reason} {detail}"
                    self._streams[number].over.set()

    def _begin(self, length: int, outputs: int) -> tuple[Stream, dict[str, Any]]:
        number = self._random.getrandbits(63)
        vocabulary = self.workers["decode"].vocab_size
        tokens = self._random.choices(range(vocabulary), k=length)
        stream = self._streams[number] = Stream(number, monotonic())
        return stream, {
            "request": number,
            "attempt": 0,
            "tokens": pack_tokens(tokens),
            "prompt_len": length,
            "choices": (0,),
            "params": SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True),
        }


class Flood:
    """Ships prompts to the decode worker as fast as it takes them."""

    def __init__(self, plan: Plan, client: Client) -> None:
        info = client.workers["decode"]
        layout = info.layout
        self._client = client
        self._num_tokens = plan.prompt_tokens
        self._num_blocks = plan.prompt_tokens // layout.block_size
        self._block_size = layout.block_size
        self._block_bytes = layout.token_bytes * layout.block_size
        self._events = EventQueue()
        identity = EndpointIdentity("flood", 1, info.content_id, layout)
        pool = Pool(self._num_blocks, self._block_bytes)
        timers = TimerConfig()
        self._endpoint = Endpoint(identity, pool, self._events, timers, "127.0.0.1", plan.transport)

    async def start(self) -> None:
        await self._endpoint.start()

    async def close(self) -> None:
        await self._endpoint.close()

    async def run(self, seconds: float) -> float:
        """Returns gigabytes per second."""
        begin = monotonic()
        streams: dict[int, Stream] = {}
        num_delivered = 0
        while streams or monotonic() < begin + seconds:
            while len(streams) < IN_FLIGHT and monotonic() < begin + seconds:
                stream = self._send()
                streams[stream.number] = stream
            event = await self._events.next()
            if isinstance(event, Broken):
                raise ConnectionError(f"a transfer failed: {event.reason} {event.detail}")
            if isinstance(event, Delivered):
                num_delivered += 1
                await self._client.finished(streams.pop(event.key.request))
        num_bytes = num_delivered * self._num_blocks * self._block_bytes
        return num_bytes / (monotonic() - begin) / 1e9

    def _send(self) -> Stream:
        stream = self._client.admit(Peer("flood", 1, self._endpoint.address))
        key = Key(stream.number, 0)
        refs = tuple(BlockRef(i, i, self._block_size) for i in range(self._num_blocks))
        self._endpoint.command(Open(key, self._client.peer("decode"), self._num_tokens))
        self._endpoint.command(Offer(key, refs))
        self._endpoint.command(Close(key, (First(0, 1, None),)))
        return stream


class Worker:
    """A process of `benchmarks.overlap_worker`."""

    def __init__(self, plan: Plan, role: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overlap_worker", str(os.getpid()), role,
             str(plan.model), str(plan.chunk_tokens), str(plan.kv_blocks), plan.transport],
            cwd=machine.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip

    def info(self) -> WorkerInfo:
        """Once it is up. Raises ConnectionError if it ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConnectionError(f"a worker ended with code {self._process.wait()}")
        return msgspec.json.decode(line, type=WorkerInfo)

    def end(self) -> Diary:
        """Raises ConnectionError if it failed."""
        self._process.terminate()
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            raise ConnectionError(f"a worker ended with code {self._process.returncode}")
        return msgspec.json.decode(output.splitlines()[-1], type=Diary)

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@dataclass(slots=True)
class Measured:
    """What was done; the diaries of the workers say the rest."""

    alone: list[Stream] = field(default_factory=list)
    idle: list[Stream] = field(default_factory=list)
    busy: list[Stream] = field(default_factory=list)
    quiet: list[Turn] = field(default_factory=list)
    flooded: list[Turn] = field(default_factory=list)


async def drive(plan: Plan, client: Client) -> Measured:
    """Every load, in turns."""
    done = Measured()
    for stream in (client.prefill(), client.serve(), client.serve()):  # pages, connections
        await client.finished(stream)
    for _ in range(plan.repeats):
        done.alone.append(await client.finished(client.prefill()))
        done.idle.append(await client.finished(client.serve()))
    async with client.busy():
        for _ in range(plan.repeats):
            done.busy.append(await client.finished(client.serve()))
    flood = Flood(plan, client)
    await flood.start()
    try:
        await flood.run(0.1)
        for _ in range(plan.turns):
            async with client.busy():
                begin = monotonic()
                await asyncio.sleep(plan.turn_s)
                middle = monotonic()
                gbps = await flood.run(plan.turn_s)
                done.quiet.append(Turn(begin, middle, 0.0))
                done.flooded.append(Turn(middle, monotonic(), gbps))
    finally:
        await flood.close()
    return done


async def measure(plan: Plan) -> dict[str, Any]:
    """The figures. Raises ConnectionError if a worker is lost or gives a request up."""
    async with AsyncExitStack() as closing:
        workers = {role: Worker(plan, role) for role in ("prefill", "decode")}
        for worker in workers.values():
            closing.callback(worker.close)
        infos = {role: worker.info() for role, worker in workers.items()}
        link = RouterLink("overlap", TimerConfig())
        closing.push_async_callback(link.close)
        for info in infos.values():
            link.connect(info)
        for _ in infos:
            assert isinstance(await link.receive(), Up)
        client = Client(plan, link, infos)
        reading = asyncio.create_task(client.read())
        driving = asyncio.create_task(drive(plan, client))
        try:
            await asyncio.wait([reading, driving], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            done = await driving
        finally:
            for task in (reading, driving):
                task.cancel()
            await asyncio.gather(reading, driving, return_exceptions=True)
        diaries = {role: worker.end() for role, worker in workers.items()}
    return figures(done, diaries["prefill"], diaries["decode"])


def figures(done: Measured, prefill: Diary, decode: Diary) -> dict[str, Any]:
    """What came out, in milliseconds and shares."""
    alone = [_prefill_s(stream, prefill.steps) for stream in done.alone]
    shipped = [_prefill_s(stream, prefill.steps) for stream in done.idle]
    held = [_held(stream, prefill, decode) for stream in done.idle]
    quiet = _step_ms(done.quiet, decode.steps)
    flooded = _step_ms(done.flooded, decode.steps)
    return {
        "idle": _gaps(done.idle),
        "busy": _gaps(done.busy),
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
        "steps": {
            "gbps": round(statistics.median(turn.gbps for turn in done.flooded), 3),
            "without": _percentiles(quiet),
            "with": _percentiles(flooded),
            "p99_ratio": round(float(np.percentile(flooded, 99) / np.percentile(quiet, 99)), 4),
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


def _step_ms(turns: Sequence[Turn], steps: Sequence[EngineStep]) -> list[float]:
    """Of the steps of these turns that computed one token of each stream."""
    return [
        (step.end - step.begin) * 1e3
        for step in steps
        if step.num_rows == step.num_tokens
        and any(turn.begin <= step.begin and step.end <= turn.end for turn in turns)
    ]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    found = {f"p{part}_ms": round(float(np.percentile(values, part)), 3) for part in (50, 99)}
    return found | {"steps": len(values)}


def report(found: dict[str, Any]) -> str:
    """The figures beside what is wanted of them."""
    lines = []
    for name in ("idle", "busy"):
        gaps = found[name]
        lines.append(
            f"{name} decode worker: token 2 comes {gaps['gap_ms_p50']} ms after token 1 (worst "
            f"{gaps['gap_ms_max']}), ITL {gaps['itl_ms']}; within {ITLS} ITL + "
            f"{SLACK_S * 1e3:.0f} ms: {gaps['share_within']:.0%}"
        )
    held, prefill, steps = found["held"], found["prefill"], found["steps"]
    lines.append(
        f"held when the last chunk starts: {held['share_when_last_chunk_starts']:.0%} of the "
        f"blocks, 70 % {held['ms_until_70_percent']} ms later; that chunk takes "
        f"{held['last_chunk_ms']} ms"
    )
    lines.append(
        f"prefill: {prefill['alone_s']} s alone, {prefill['shipped_s']} s shipped, ratio "
        f"{prefill['ratio']} (at most 1.03)"
    )
    lines.append(
        f"decode step p99: {steps['without']['p99_ms']} ms alone, {steps['with']['p99_ms']} ms "
        f"with {steps['gbps']} GB/s coming in, ratio {steps['p99_ratio']} (at most 1.03)"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how much of shipping computing hides.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter turns")
    parser.add_argument("--model", type=Path, metavar="DIR", help=f"checkpoint (random {SHAPE})")
    parser.add_argument("--transport", default="auto", choices=TRANSPORTS)
    arguments = parser.parse_args()
    plan = Plan(arguments.model or checkpoint(SHAPE), arguments.transport)
    if arguments.quick:
        plan = Plan(plan.model, plan.transport, repeats=2, turns=1, turn_s=4.0)
    busy_share = machine.busy_share()
    if busy_share > 0.1:
        print(f"The machine is {busy_share:.0%} busy already: the figures are doubtful.")
    try:
        found = asyncio.run(measure(plan))
    except ConnectionError as error:
        print(f"overlap: error: {error}", file=sys.stderr)
        return 1
    print(report(found))
    if arguments.json is not None:
        document = machine.provenance() | {"busy_share": round(busy_share, 3)} | found
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
