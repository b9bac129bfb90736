"""Stub workers as real processes, and a client that plays the router and trusts nobody.

The client checks every token against what the stub must say at its place, takes each index once,
places what failed anew after the tokens so far, and measures how long each request was without
news. `invariants.check` asks it at the end of a test.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec

from common.blockhash import UNIT, pack_tokens
from common.link import Down, Message, RouterLink, Up
from common.messages import (
    Admit,
    Cancel,
    Failed,
    FetchFrom,
    Inspect,
    Inspected,
    Ledger,
    Output,
    Peer,
    Prefill,
    Step,
    WorkerInfo,
)
from common.sampling import SamplingParams
from tests.faults.spec import Armed, Born, Dying, Ended, Report, Spec
from tests.redis_server import RedisServer
from tests.stub import stub_token

MAX_ATTEMPTS = 40
LONGEST_TALK = 140
"""Tokens of a conversation that goes on."""
FETCH_WITHIN_S = (0.01, 60.0)
"""Late at once, or hardly ever."""
START_S = 120.0
LEAVE_S = 40.0
TICK_S = 0.02


@dataclass(eq=False)
class Life:
    """One life of one worker, from its Spec to its end."""

    spec: Spec
    info: WorkerInfo | None = None
    up: bool = False
    armed: bool = False
    last_words: str = ""
    code: int | None = None
    signalled: set[signal.Signals] = field(default_factory=set)
    ledger: Ledger | None = None

    @property
    def pid(self) -> int:
        assert self.info is not None, self.spec
        return self.info.pid


@dataclass(eq=False)
class Request:
    """One request; `outcome` is empty until it ends: `length`, `cancelled`."""

    number: int
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    attempt: int = -1
    prefill: Life | None = None
    decode: Life | None = None
    outcome: str = ""
    failures: list[str] = field(default_factory=list)
    news_at: float = 0.0
    longest_s: float = 0.0
    """Without news while it was placed."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    def __init__(self, redis: str, transport: str, directory: Path, seed: int) -> None:
        self.random = Random(seed)
        self.lives: list[Life] = []
        self.requests: list[Request] = []
        self.live: dict[int, Request] = {}
        self.errors: list[str] = []
        """What must never happen, as it was seen."""
        self.counts: Counter[str] = Counter()
        self.resumes = True
        """Whether what failed is withdrawn and placed anew, as a router does."""
        self.fetching = 0.0
        """Probability that whoever prefills is told to fetch from another worker first, and half
        of it that the decode worker prefills."""
        self.scored = 0.0
        """Probability that a request wants log-probabilities: its first token needs a Close."""
        self.clock_s = 0.0
        """Seconds by a clock that stands still while this process gets no processor: a starved
        machine is not taken for a hang."""
        self._redis = redis
        self._transport = transport
        self._by_name: dict[str, Life] = {}
        self._changed = asyncio.Condition()
        self._log = (directory / "workers.log").open("w+b")
        self._tasks: list[asyncio.Task[None]] = []
        self._unplaced: list[Request] = []

    # ------------------------------------------------------------ workers

    async def birth(self, role: str, **changes: object) -> Life:
        """Start a worker and wait until it can be used."""
        life = self.conceive(role, **changes)
        await self.until(lambda: life.up)
        return life

    def conceive(self, role: str, **changes: object) -> Life:
        fields = {"name": f"{role}-{len(self.lives)}", "transport": self._transport}
        spec = Spec(role=role, redis=self._redis, **(fields | changes))  # type: ignore[arg-type]
        life = self._by_name[spec.name] = Life(spec)
        self.lives.append(life)
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(msgspec.json.encode(spec) + b"\n")
        return life

    def signal(self, life: Life, number: signal.Signals) -> None:
        life.signalled.add(number)
        os.kill(life.pid, number)

    async def arm(self, life: Life) -> None:
        """From now on the victim dies at its step; under load it may have died already."""
        self.signal(life, signal.SIGUSR1)
        await self.until(lambda: life.armed or life.code is not None)

    def ups(self, role: str) -> list[Life]:
        return [life for life in self.lives if life.up and life.spec.role == role]

    @property
    def present(self) -> list[Life]:
        """Lives that have not ended."""
        return [life for life in self.lives if life.code is None]

    async def until(self, holds: Callable[[], object], timeout_s: float = START_S) -> None:
        """Wait until `holds()`, which is looked at after every event."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(holds)
        except TimeoutError:
            raise AssertionError(f"not within {timeout_s} s\n{self.story()}") from None

    async def ledger(self, life: Life) -> Ledger:
        """Asked now."""
        life.ledger = None
        self._link.send(life.spec.name, Inspect(0))
        await self.until(lambda: life.ledger is not None)
        assert life.ledger is not None
        return life.ledger

    async def counters(self, life: Life) -> dict[str, float]:
        """The counters of its transfers, as `name` or `name.reason`."""
        assert life.info is not None
        host, _, port = (
            life.info.metrics_url.removeprefix("http://").partition("/")[0].partition(":")
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        found = {}
        for line in text.splitlines():
            if line.startswith("tandem_transfer{"):
                labels, _, value = line.removeprefix("tandem_transfer{").rpartition("} ")
                name, reason = (part.split('"')[1] for part in labels.split(","))
                found[f"{name}.{reason}" if reason else name] = float(value)
            elif line.startswith("tandem_fetches_total{"):
                found["fetches." + line.split('"')[1]] = float(line.rpartition(" ")[2])
            elif line.startswith("tandem_resets_total"):
                found["resets"] = float(line.rpartition(" ")[2])
        return found

    def story(self) -> str:
        """What the workers wrote, and where every one of them is."""
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")[-6000:]
        lives = [(life.spec.name, life.up, life.code, life.last_words) for life in self.lives[-8:]]
        waiting = [(r.number, r.attempt, len(r.tokens), r.failures) for r in self.live.values()]
        return f"errors {self.errors}\nlives {lives}\nlive requests {waiting[:8]}\n{text}"

    # ------------------------------------------------------------ requests

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        seed: int | None = None,
        on: tuple[Life, Life, Life | None] | None = None,
    ) -> Request:
        """`on`: where it is placed first, as in `send`; at random without."""
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=self.random.getrandbits(32) if seed is None else seed,
            logprobs=0 if self.scored and self.random.random() < self.scored else None,
        )
        request = Request(len(self.requests) + 1, prompt, params)
        self.requests.append(request)
        self.live[request.number] = request
        if on is None:
            self.place(request)
        else:
            request.attempt = 0
            self.news(request, first=True)
            self.send(request, *on)
        return request

    def some_prompt(self, most: int = 90) -> list[int]:
        """Half of them begin like others, so that blocks are cached at either side; where prefixes
        are fetched, some are turns of conversations."""
        if self.random.random() < self.fetching:
            ended = [request for request in self.requests[-40:] if request.outcome == "length"]
            talks = [request.prompt + request.tokens for request in ended]
            talks = [talk for talk in talks if len(talk) < LONGEST_TALK]
            if talks:
                return self.random.choice(talks) + self.random.choices(range(900), k=5)
        common = [number % 900 for number in range(self.random.choice((0, 0, 16, 40)))]
        return common + self.random.choices(range(900), k=self.random.randint(1, most))

    def place(self, request: Request) -> None:
        """On a random pair, or as soon as there is one."""
        prefills, decodes = self.ups("prefill"), self.ups("decode")
        if not prefills or not decodes:
            request.prefill = request.decode = None
            self._unplaced.append(request)
            return
        request.attempt += 1
        if request.attempt >= MAX_ATTEMPTS:
            self.errors.append(f"request {request.number} failed {MAX_ATTEMPTS} times")
            self.end(request, "given up")
            return
        self.news(request, first=True)
        prefill, decode = self.random.choice(prefills), self.random.choice(decodes)
        owner, within_s = None, 0.0
        if self.random.random() < self.fetching:
            prefill = self.random.choice((prefill, decode))
            others = [life for life in (*prefills, *decodes) if life is not prefill]
            owner, within_s = self.random.choice(others), self.random.choice(FETCH_WITHIN_S)
        self.send(request, prefill, decode, owner, within_s)

    def send(
        self,
        request: Request,
        prefill: Life,
        decode: Life,
        owner: Life | None = None,
        within_s: float = FETCH_WITHIN_S[1],
    ) -> None:
        """An attempt on this pair (the same life twice: it prefills itself); whoever prefills
        fetches from `owner` first."""
        request.prefill, request.decode = prefill, decode
        tokens = request.prompt + request.tokens
        fetch = owner and FetchFrom(peer_of(owner), len(tokens) // UNIT, within_s)
        work = {
            "request": request.number,
            "attempt": request.attempt,
            "tokens": pack_tokens(tokens),
            "prompt_len": len(request.prompt),
            "choices": (0,),
            "params": request.params,
        }
        if prefill is decode:
            admit = Admit(**work, fetch=fetch)  # type: ignore[arg-type]
            self._link.send(decode.spec.name, admit)
            return
        alone = len(request.tokens) + 1 == request.params.max_tokens
        to = None if alone else peer_of(decode)
        begin = Prefill(**work, decode=to, fetch=fetch)  # type: ignore[arg-type]
        self._link.send(prefill.spec.name, begin)
        if not alone:
            admit = Admit(**work, prefill=peer_of(prefill))  # type: ignore[arg-type]
            self._link.send(decode.spec.name, admit)

    def cancel(self, request: Request) -> bool:
        """The client leaves; False if the request had ended."""
        if request.outcome:
            return False
        self.withdraw(request)
        self.end(request, "cancelled")
        return True

    def withdraw(self, request: Request) -> None:
        for life in (request.prefill, request.decode):
            if life is not None:
                self._link.send(life.spec.name, Cancel(request.number, request.attempt))

    def replace(self, request: Request, reason: str) -> None:
        """The present attempt failed."""
        request.failures.append(reason)
        self.counts[f"failed {reason.partition(':')[0]}"] += 1
        if not self.resumes:
            self.end(request, "failed")
            return
        self.withdraw(request)
        self.place(request)

    async def finished(self, request: Request, timeout_s: float = 60.0) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await request.changed.wait()
        except TimeoutError:
            raise AssertionError(f"{request} does not end\n{self.story()}") from None

    async def serve(self, count: int, at_once: int = 8) -> None:
        """So many requests in a closed loop, each to its end."""
        gate = asyncio.Semaphore(at_once)

        async def one() -> None:
            async with gate:
                await self.finished(self.submit(self.some_prompt(), self.random.randint(1, 12)))

        await asyncio.gather(*(one() for _ in range(count)))

    async def converse(self, owner: Life) -> list[int]:
        """A turn that `owner` serves alone; returns what it caches most of then."""
        prompt = self.random.choices(range(900), k=70)
        request = self.submit(prompt, 12, on=(owner, owner, None))
        await self.finished(request)
        return request.prompt + request.tokens

    async def meet(self, prefill: Life, decode: Life) -> None:
        """Each of them sends to the other: connections are there in both directions."""
        talk = await self.converse(decode)
        await self.finished(self.submit([*talk, 1], 6, on=(prefill, decode, decode)))
        await self.finished(self.submit([1, *talk], 6, on=(prefill, decode, None)))

    def end(self, request: Request, outcome: str) -> None:
        self.news(request)
        request.outcome = outcome
        self.counts[outcome] += 1
        del self.live[request.number]
        request.changed.set()

    def news(self, request: Request, first: bool = False) -> None:
        now = self.clock_s
        if not first and request.prefill is not None:
            request.longest_s = max(request.longest_s, now - request.news_at)
        request.news_at = now

    # ------------------------------------------------------------ what comes in

    def take(self, life: Life, message: object) -> None:
        match message:
            case Step(outputs):
                for output in outputs:
                    request = self.live.get(output.request)
                    if request is not None and request.attempt == output.attempt:
                        self._take_output(request, output)
                    else:
                        self.counts["late"] += 1
            case Failed(number, attempt, reason, detail):
                request = self.live.get(number)
                if request is not None and request.attempt == attempt:
                    self.replace(request, f"{reason}: {detail}")
            case Inspected(_, ledger):
                life.ledger = ledger

    def _take_output(self, request: Request, output: Output) -> None:
        self.news(request)
        if output.index > len(request.tokens):
            self.errors.append(f"a gap before {output} of {request}")
        for index, token in enumerate(output.tokens, output.index):
            right = stub_token(request.params.seed, 0, len(request.prompt) + index)
            if token != right:
                self.errors.append(f"token {index} of {request} is {token}, not {right}")
            if index == len(request.tokens):
                request.tokens.append(token)
        if output.finish:
            if output.finish != "length" or len(request.tokens) != request.params.max_tokens:
                self.errors.append(f"{request} ended with {output}")
            self.end(request, output.finish)

    def _down(self, life: Life) -> None:
        life.up = False
        for request in list(self.live.values()):
            if life in (request.prefill, request.decode):
                self.replace(request, "down")

    async def _read_link(self) -> None:
        while True:
            event = await self._link.receive()
            async with self._changed:
                match event:
                    case Up(info):
                        life = self._by_name[info.id]
                        life.info, life.up = info, True
                        unplaced, self._unplaced = self._unplaced, []
                        for request in unplaced:
                            if not request.outcome:
                                self.place(request)
                    case Down(worker_id):
                        self._down(self._by_name[worker_id])
                    case Message(worker_id, message):
                        self.take(self._by_name[worker_id], message)
                self._changed.notify_all()

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.clock_s += min(now - last, 2 * TICK_S)
            last = now

    async def _read_reports(self) -> None:
        assert self._nursery.stdout is not None
        while line := await self._nursery.stdout.readline():
            report: Report = msgspec.json.decode(line, type=Report)
            life = self._by_name[report.name]
            async with self._changed:
                match report:
                    case Born(_, info):
                        life.info = info
                        self._link.connect(info)
                    case Armed():
                        life.armed = True
                    case Dying(_, step):
                        life.last_words = step
                    case Ended(name, _, code):
                        life.code = code
                        self._link.disconnect(name)
                        if life.up:
                            self._down(life)
                        if (
                            code != 0
                            and not life.last_words
                            and signal.SIGKILL not in life.signalled
                        ):
                            self.errors.append(f"{name} ended with code {code}")
                self._changed.notify_all()

    # ------------------------------------------------------------ start and end

    async def open(self) -> None:
        self._nursery = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.nursery",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._link = RouterLink("test", Spec(name="", role="", transport="", redis="").timers)
        self._tasks = [
            asyncio.create_task(self._read_link()),
            asyncio.create_task(self._read_reports()),
            asyncio.create_task(self._tick()),
        ]

    async def leave(self) -> None:
        """End every worker as an operator would: each must end by itself, with code 0."""
        for life in self.present:
            self.signal(life, signal.SIGTERM)
        try:
            await self.until(lambda: not self.present, LEAVE_S)
        except AssertionError:
            for life in self.present:
                self.signal(life, signal.SIGABRT)  # it writes where its threads are
            await self.until(lambda: not self.present)
            raise AssertionError(f"I5: did not end\n{self.story()}") from None

    async def close(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._link.close()
        await self._nursery.wait()  # whatever it forked dies with it
        self._log.close()


def peer_of(life: Life) -> Peer:
    assert life.info is not None
    return Peer(life.info.id, life.info.epoch, life.info.kv_address)


@contextlib.asynccontextmanager
async def fleet(transport: str, seed: int = 0) -> AsyncIterator[Fleet]:
    """Without workers yet; all processes end with it."""
    with tempfile.TemporaryDirectory(prefix="td-") as directory:
        redis = RedisServer(Path(directory))
        redis.start()
        found = Fleet(redis.url, transport, Path(directory), seed)
        try:
            await found.open()
            try:
                yield found
            finally:
                await found.close()
        finally:
            redis.close()
