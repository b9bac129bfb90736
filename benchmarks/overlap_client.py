"""The loads of `benchmarks.overlap`: a router without a registry, and a sender that never rests."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

from benchmarks.overlap_figures import Stream
from benchmarks.transfer_peer import EventQueue, Pool
from common.blockhash import pack_tokens
from common.config import TimerConfig
from common.link import Down, Message, RouterLink
from common.messages import Admit, Cancel, Failed, Peer, Prefill, Step, WorkerInfo
from common.sampling import SamplingParams
from kvtransfer.commands import BlockRef, Broken, Close, Delivered, First, Key, Offer, Open
from kvtransfer.endpoint import Endpoint
from kvtransfer.identity import EndpointIdentity

IN_FLIGHT: Final = 8
"""Prompts that are shipped at a time when blocks come in as fast as they can: the engine answers
between two steps only."""
STREAM_PROMPT: Final = 32
"""Tokens of the prompt of a stream that keeps the decode worker busy."""
PACED_PROMPT: Final = 2
PACED_OUTPUTS: Final = 64
"""Tokens of a stream that comes and goes: next to nothing but decode steps."""


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    transport: str = "auto"
    prompt_tokens: int = 2048
    """A multiple of the block size."""
    chunk_tokens: int = 512
    outputs: int = 12
    repeats: int = 3
    streams: int = 8
    """That keep the decode worker busy."""
    turns: int = 2
    turn_s: float = 10.0
    kv_blocks: int = 2560


class Client:
    """The router of both workers. Every prompt is new, so that nobody has it cached."""

    def __init__(self, plan: Plan, link: RouterLink, workers: dict[str, WorkerInfo]) -> None:
        self.workers = workers
        self.rates: list[float] = []
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

    def serve(self, outputs: int = 0) -> Stream:
        """A prompt that is computed by one worker and continued by the other."""
        stream, work = self._begin(self._plan.prompt_tokens, outputs or self._plan.outputs)
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
        """The decode worker has streams to compute for as long as this lasts; adds to `rates` the
        tokens per second that came."""
        most = self.workers["decode"].max_model_len - STREAM_PROMPT
        begun = [self._begin(STREAM_PROMPT, most) for _ in range(self._plan.streams)]
        for _, work in begun:
            self._link.send(self.workers["decode"].id, Admit(**work))
        for stream, _ in begun:
            while not stream.times:
                await asyncio.sleep(0.01)
        start, before = monotonic(), sum(len(stream.times) for stream, _ in begun)
        yield
        num_tokens = sum(len(stream.times) for stream, _ in begun) - before
        self.rates.append(num_tokens / (monotonic() - start))
        for stream, _ in begun:
            self._link.send(self.workers["decode"].id, Cancel(stream.number, 0))
            del self._streams[stream.number]

    @asynccontextmanager
    async def paced(self, tokens_per_s: float) -> AsyncIterator[None]:
        """Short streams come to the decode worker evenly, so that it has to write this many tokens
        per second."""
        ongoing: set[asyncio.Task[Stream]] = set()
        began = False

        async def come() -> None:
            nonlocal began
            while True:
                stream, work = self._begin(PACED_PROMPT, PACED_OUTPUTS)
                self._link.send(self.workers["decode"].id, Admit(**work))
                task = asyncio.create_task(self.finished(stream))
                ongoing.add(task)
                task.add_done_callback(ended)
                await asyncio.sleep(PACED_OUTPUTS / tokens_per_s)

        def ended(task: asyncio.Task[Stream]) -> None:
            nonlocal began
            began = True
            ongoing.discard(task)

        coming = asyncio.create_task(come())
        try:
            while not began:  # until then there are fewer streams than later
                await asyncio.sleep(0.05)
            yield
        finally:
            coming.cancel()
            await asyncio.gather(coming, *ongoing, return_exceptions=True)

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
