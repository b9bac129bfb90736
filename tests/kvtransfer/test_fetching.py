"""Prefixes fetched from the caches of other workers: engines of both roles with a stub model, each
with a real endpoint. The stub's KV betrays every foreign or missing block."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from queue import SimpleQueue
from time import monotonic

import pytest

from common.blockhash import pack_tokens
from common.config import TimerConfig
from common.engine import Engine
from common.events import Drain, Fence, Fenced, FromRouter, Send, Ship
from common.messages import Admit, Cancel, Failed, FetchFrom, Peer, Prefill, Step
from common.sampling import SamplingParams
from decode.engine import DecodeEngine
from kvtransfer.endpoint import Endpoint
from kvtransfer.identity import EndpointIdentity
from prefill.engine import PrefillEngine
from tests.kvtransfer import node
from tests.kvtransfer.node import PATIENT, TIMERS
from tests.stub import StubPool, stub_parts, stub_token

pytestmark = pytest.mark.usefixtures("transport")

ROUTER = b"router"
LONG_S = 60.0


class Station:
    """One worker: the turns of its engine are taken in the loop of its endpoint."""

    def __init__(
        self, name: str, num_blocks: int = 64, block_size: int = 16, timers: TimerConfig = PATIENT
    ) -> None:
        role = "prefill" if name.startswith("p") else "decode"
        parts = stub_parts(num_blocks, role, block_size=block_size)
        kind = PrefillEngine if role == "prefill" else DecodeEngine
        self.engine: Engine = kind(*parts)
        pool = parts[0].pool
        assert isinstance(pool, StubPool)
        self.name, self.epoch = name, sum(name.encode())
        self.inbox: SimpleQueue[object] = SimpleQueue()
        identity = EndpointIdentity(name, self.epoch, "stub", pool.layout.info())
        self.endpoint = Endpoint(identity, pool, self.inbox, timers, "127.0.0.1", node.TRANSPORT)
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.finished: set[int] = set()
        self.failed: dict[int, str] = {}
        self.commands: list[object] = []

    @property
    def peer(self) -> Peer:
        return Peer(self.name, self.epoch, self.endpoint.address)

    def send(self, message: Prefill | Admit | Cancel) -> None:
        self.inbox.put(FromRouter(ROUTER, message))

    def turn(self) -> None:
        engine = self.engine
        while not self.inbox.empty():
            engine.take(self.inbox.get(), monotonic())
        engine.expire(monotonic())
        batch = engine.next_batch()
        results = engine.step(batch) if batch else []
        self._carry()
        if batch:
            engine.settle(batch, results)
            self._carry()
        engine.blocks.check()

    def _carry(self) -> None:
        for item in self.engine.flush():
            match item:
                case Ship(command):
                    self.commands.append(command)
                    self.endpoint.command(command)
                case Fence(attempt):
                    self.inbox.put(Fenced(attempt))
                case Send(_, Failed(request, _, reason)):
                    self.failed[request] = reason
                case Send(_, Step(outputs)):
                    for output in outputs:
                        known = self.tokens.setdefault(output.request, [])
                        known[output.index :] = output.tokens
                        if output.cached_tokens >= 0:
                            self.cached[output.request] = output.cached_tokens
                        if output.finish:
                            self.finished.add(output.request)

    def said(self, kind: str) -> int:
        return sum(type(command).__name__ == kind for command in self.commands)

    def outcome(self, name: str) -> float:
        value = self.engine.metrics.registry.get_sample_value(
            "tandem_fetches_total", {"outcome": name}
        )
        return value or 0.0

    def count(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(f"tandem_{name}", labels) or 0.0

    def is_quiet(self) -> bool:
        ledger = self.engine.blocks.ledger(self.engine.num_held())
        held = ledger.in_use + ledger.leased + ledger.receiving + ledger.draining
        return self.engine.idle() and not held and not ledger.running


@asynccontextmanager
async def running(*stations: Station) -> AsyncIterator[None]:
    for station in stations:
        await station.endpoint.start()
    try:
        yield
    finally:
        for station in stations:
            await station.endpoint.close()


async def until(holds: Callable[[], bool], *stations: Station) -> None:
    async with asyncio.timeout(60):
        while not holds():
            for station in stations:
                station.turn()
            await asyncio.sleep(0.001)


def work(request: int, tokens: list[int], outputs: int = 20) -> dict[str, object]:
    return {
        "request": request,
        "attempt": 1,
        "tokens": pack_tokens(tokens),
        "prompt_len": len(tokens),
        "choices": (0,),
        "params": SamplingParams(max_tokens=outputs, seed=request),
    }


def some(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(900), k=length)


def expected(request: int, start: int, count: int) -> list[int]:
    return [stub_token(request, 0, start + i) for i in range(count)]


async def converse(d: Station, request: int, prompt: list[int], outputs: int = 40) -> list[int]:
    """A turn that `d` serves alone; returns the conversation after it."""
    d.send(Admit(**work(request, prompt, outputs)))  # type: ignore[arg-type]
    await until(lambda: request in d.finished, d)
    return [*prompt, *d.tokens[request]]


def fetch_from(owner: Station, tokens: int, within_s: float = LONG_S) -> FetchFrom:
    return FetchFrom(owner.peer, tokens // 16, within_s)


@pytest.mark.parametrize(("here", "there"), [(16, 16), (32, 16), (16, 32)])
async def test_a_prefill_worker_fetches_a_conversation(here: int, there: int) -> None:
    """Turn 2: the decode worker has computed and cached what the prefill worker needs."""
    p, d = Station("p", block_size=here), Station("d", block_size=there)
    async with running(p, d):
        talk = await converse(d, 1, some(100))
        held = (len(talk) - 1) // there * there  # the last token's KV was never computed
        prompt = [*talk, *some(61, 2)]
        p.send(Prefill(**work(2, prompt), decode=d.peer, fetch=fetch_from(d, held)))  # type: ignore[arg-type]
        d.send(Admit(**work(2, prompt), prefill=p.peer))  # type: ignore[arg-type]
        await until(lambda: 2 in d.finished and p.is_quiet() and d.is_quiet(), p, d)
        assert d.tokens[2] == expected(2, len(prompt), 20)
        fetched = held // here * here
        assert p.cached[2] == fetched
        assert p.count("prompt_tokens_total", source="computed") == len(prompt) - fetched
        assert p.count("fetched_tokens_total") == fetched
        assert p.outcome("arrived") == 1
        assert d.endpoint.stats().blocks_sent == fetched // here
        assert p.endpoint.stats().blocks_sent == -(-len(prompt) // there) - held // there
        assert p.engine.load().fetch_bps > 0


async def test_a_decode_worker_fetches_for_its_own_prefill() -> None:
    a, b = Station("da"), Station("db")
    async with running(a, b):
        talk = await converse(a, 1, some(100))
        b.send(Admit(**work(2, talk), fetch=fetch_from(a, 128)))  # type: ignore[arg-type]
        await until(lambda: 2 in b.finished and a.is_quiet() and b.is_quiet(), a, b)
        assert b.tokens[2] == expected(2, len(talk), 20)
        assert (b.cached[2], a.endpoint.stats().blocks_sent) == (128, 8)


async def test_a_prefill_worker_fetches_only_what_it_lacks_from_another() -> None:
    a, b = Station("pa"), Station("pb")
    prompt = some(200)
    async with running(a, b):
        for station, tokens in ((a, prompt), (b, prompt[:100])):
            station.send(Prefill(**work(1, tokens, 1), decode=None))  # type: ignore[arg-type]
            await until(lambda s=station: 1 in s.finished, station)  # type: ignore[misc]
        b.send(Prefill(**work(2, prompt, 1), decode=None, fetch=fetch_from(a, 192)))  # type: ignore[arg-type]
        await until(lambda: 2 in b.finished and a.is_quiet() and b.is_quiet(), a, b)
        assert b.tokens[2] == expected(2, 200, 1)
        assert (b.cached[2], a.endpoint.stats().blocks_sent) == (192, 12 - 6)
        # What it holds by now is not fetched again.
        b.send(Prefill(**work(3, prompt, 1), decode=None, fetch=fetch_from(a, 192)))  # type: ignore[arg-type]
        await until(lambda: 3 in b.finished, a, b)
        assert (b.cached[3], b.said("Fetch")) == (192, 1)


@pytest.mark.parametrize("why", ["gone", "draining", "busy"])
async def test_an_owner_that_gives_nothing(why: str) -> None:
    a, b = Station("da", 16), Station("pb")
    prompt = some(100)
    async with running(a, b):
        if why != "gone":
            await converse(a, 1, prompt)
        if why == "draining":
            a.inbox.put(Drain(LONG_S))
        if why == "busy":
            a.engine._given[99, 1] = a.engine.blocks.allocate(8) or []  # type: ignore[attr-defined]
        b.send(Prefill(**work(2, prompt, 1), decode=None, fetch=fetch_from(a, 96)))  # type: ignore[arg-type]
        await until(lambda: 2 in b.finished, a, b)
        assert (b.tokens[2], b.cached[2]) == (expected(2, 100, 1), 0)
        assert b.outcome(why) == 1 and b.is_quiet()


async def test_an_owner_that_is_not_there() -> None:
    b = Station("pb", timers=TIMERS)
    prompt = some(100)
    async with running(b):
        nobody = FetchFrom(Peer("d", 7, "tcp://127.0.0.1:1"), 6, LONG_S)
        b.send(Prefill(**work(2, prompt, 1), decode=None, fetch=nobody))  # type: ignore[arg-type]
        await until(lambda: 2 in b.finished, b)
        assert (b.tokens[2], b.outcome("peer")) == (expected(2, 100, 1), 1)
        assert b.is_quiet()


@pytest.mark.parametrize("fetcher", ["pb", "db"])
@pytest.mark.parametrize("end", ["late", "dies", "cancelled", "late before an answer"])
async def test_a_fetch_that_does_not_arrive(
    fetcher: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's blocks never leave it; what is left of them here is exactly nothing."""
    timers = TIMERS if end == "dies" else PATIENT
    a, b = Station("da", timers=timers), Station(fetcher, timers=timers)
    prompt = some(100)
    monkeypatch.setattr(a.endpoint, "_pump", lambda: None)
    async with running(b):
        await a.endpoint.start()
        await converse(a, 1, prompt)
        source = fetch_from(a, 96, 1.0 if end == "late" else LONG_S)
        if end == "late before an answer":
            source = fetch_from(a, 96, 0.0)
        common = work(2, prompt, 1)
        if fetcher == "pb":
            b.send(Prefill(**common, decode=None, fetch=source))  # type: ignore[arg-type]
        else:
            b.send(Admit(**common, fetch=source))  # type: ignore[arg-type]
        live = [a, b]
        if end != "late before an answer":
            asked = "Grant" if end != "late" else "Fetch"
            await until(lambda: b.said(asked) == 1, a, b)
        if end == "dies":
            await a.endpoint.close()
            live = [b]
        if end == "cancelled":
            b.send(Cancel(2, 1))
            await until(lambda: b.is_quiet() and a.is_quiet(), *live)
            assert b.outcome("dropped") == 1 and 2 not in b.tokens
        else:
            await until(lambda: 2 in b.finished, *live)
            assert (b.tokens[2], b.cached[2]) == (expected(2, 100, 1), 0)
            outcomes = {"late": ("late",), "dies": ("peer", "stalled")}
            assert sum(b.outcome(name) for name in outcomes.get(end, ("late",))) == 1
        await until(lambda: all(station.is_quiet() for station in live), *live)
        if end != "dies":
            await a.endpoint.close()


async def test_a_pool_too_small_for_what_is_fetched() -> None:
    a, b = Station("da"), Station("db", 12)
    async with running(a, b):
        talk = await converse(a, 1, some(100), 10)
        b.send(Admit(**work(9, some(100, 5), 60)))  # type: ignore[arg-type]
        await until(lambda: len(b.tokens.get(9, [])) > 3, b)
        b.send(Admit(**work(2, talk), fetch=fetch_from(a, 96)))  # type: ignore[arg-type]
        await until(lambda: {2, 9} <= b.finished, a, b)
        assert b.tokens[2] == expected(2, len(talk), 20) and b.tokens[9] == expected(9, 100, 60)
        await until(lambda: a.is_quiet() and b.is_quiet(), a, b)
        assert b.outcome("no_blocks") == 1
