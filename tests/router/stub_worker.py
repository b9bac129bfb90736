"""A worker without engine and KV: real link and registration, tokens that follow from the prompt.

The next token is a function of (seed, choice, all tokens so far), so a resumed request gets the
same tokens only if the router sent exactly what was emitted. A prefill stub answers the first
token; a decode stub that is told of a prefill worker waits for that, repeats the token and goes
on by itself, one token per sequence and step.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import msgspec

from common.blockhash import pack_tokens, unpack_tokens
from common.config import TimerConfig
from common.link import WorkerLink
from common.messages import (
    Admit,
    Cancel,
    Failed,
    Inspect,
    Inspected,
    Leaving,
    Ledger,
    Load,
    Output,
    Ping,
    Pong,
    Prefill,
    Step,
    TokenLogprob,
    ToRouter,
    ToWorker,
)
from common.registry import Registration
from common.sampling import SamplingParams
from tests.router.text_files import EOS
from tests.worker_info import worker_info

VOCAB = 320
_Kind = TypeVar("_Kind")


def next_token(seed: int, choice: int, tokens: Sequence[int]) -> int:
    digest = blake2b(f"{seed}/{choice}/".encode() + pack_tokens(tokens), digest_size=8).digest()
    return 4 + int.from_bytes(digest, "little") % (VOCAB - 4)


def expected(prompt: Sequence[int], count: int, *, seed: int = 0, choice: int = 0) -> list[int]:
    """The tokens that a request must get, whatever happens to it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(seed, choice, tokens))
    return tokens[len(prompt) :]


class Handoffs:
    """What the KV transfers of a whole deployment would bring: attempts that were prefilled."""

    def __init__(self) -> None:
        self.arrived: dict[tuple[int, int], int] = {}
        """(request, attempt) -> tokens of the prompt that the prefill worker's cache held."""
        self.more = asyncio.Event()
        """Set, and replaced by a new one, when something arrived."""

    def add(self, output: Output) -> None:
        key = (output.request, output.attempt)
        self.arrived[key] = max(output.cached_tokens, self.arrived.get(key, -1))
        more, self.more = self.more, asyncio.Event()
        more.set()


@dataclass(eq=False)
class _Sequence:
    request: int
    attempt: int
    choice: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    router: bytes
    cached_tokens: int
    awaits_kv: bool
    script: Sequence[int] = ()
    prefills: bool = True

    def step(self) -> Output:
        """One more token."""
        params = self.params
        index = len(self.tokens) - self.prompt_len
        token = next_token(params.seed, self.choice, self.tokens)
        if self.script:
            token = self.script[index] if index < len(self.script) else EOS
        if dict(params.logit_bias).get(token, 0) == -100:
            token = EOS
        self.tokens.append(token)
        is_stop = token in params.stop_token_ids
        finish = ""
        if is_stop or (token == EOS and not params.ignore_eos):
            finish = "stop"
        elif index + 1 >= params.max_tokens:
            finish = "length"
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            top = tuple((4 + i, -1.0 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprob(token, -0.5, top),)
        scores: tuple[TokenLogprob, ...] = ()
        if params.prompt_logprobs is not None and self.prefills and index == 0:
            scores = tuple(TokenLogprob(t, -0.25, ()) for t in self.tokens[1 : self.prompt_len])
        cached, self.cached_tokens = self.cached_tokens, -1
        return Output(
            self.request,
            self.attempt,
            self.choice,
            index,
            (token,),
            finish,
            token if is_stop else -1,
            logprobs,
            cached,
            scores,
        )


class StubWorker:
    """`seen` has everything but pings; `gate` closed: the worker lives but computes nothing."""

    def __init__(
        self,
        id: str,
        role: str,
        redis_url: str,
        namespace: str,
        *,
        text_id: str,
        handoffs: Handoffs,
        num_blocks: int = 4096,
        max_model_len: int = 1024,
        timers: TimerConfig,
    ) -> None:
        self.info = worker_info(
            id,
            role=role,
            epoch=secrets.randbits(63),
            text_id=text_id,
            vocab_size=VOCAB,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_num_seqs=64,
        )
        self.seen: list[ToWorker] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.step_s = 0.0
        self.cached_tokens = 0
        self.fail: str = ""
        """Reason with which every new attempt is answered."""
        self.script: Sequence[int] = ()
        """What every answer consists of; nothing: tokens that follow from prompt and seed."""
        self.mute = False
        """Inspect is not answered."""
        self.unsaid: list[tuple[bytes, Step]] | None = None
        """Steps that were computed and do not get out yet; None: they are sent at once."""
        self.ends_at = 1 << 30
        """Steps after which the gate closes by itself."""
        self._handoffs = handoffs
        self._redis = (redis_url, namespace)
        self._timers = timers
        self._link = WorkerLink("127.0.0.1", timers)
        self._running: list[_Sequence] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._registration: Registration | None = None
        self._busy = False
        """As of the last turn: an engine that hangs stays busy, whatever is cancelled."""
        self.steps = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    def received(self, kind: type[_Kind]) -> list[_Kind]:
        return [message for message in self.seen if isinstance(message, kind)]

    async def start(self) -> None:
        await self._link.start()
        self.info = msgspec.structs.replace(self.info, address=self._link.address)
        self._link.set_info(self.info)
        url, namespace = self._redis
        self._registration = Registration(url, namespace, self._timers.registry_ttl_s, self.info)
        for work in (self._registration.run(), self._receive(), self._run()):
            self._tasks.append(asyncio.create_task(work))

    async def stop(self) -> None:
        """Leave in order: the registry entry goes with the worker."""
        if self._registration is not None:
            await self._registration.leave()
        await self.kill()

    async def kill(self) -> None:
        """End as with SIGKILL: sockets close, the registry entry stays until it expires."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._running.clear()
        if self._tasks:
            self._tasks.clear()
            await self._link.close()

    def go_on(self) -> None:
        """Open the gate for good."""
        self.ends_at = 1 << 30
        self.gate.set()

    @property
    def router(self) -> bytes:
        """The router of the first sequence."""
        return self._running[0].router

    def tell(self, router: bytes, message: ToRouter) -> None:
        self._link.send(router, message)

    def speak(self) -> None:
        """Send what was held back, and whatever comes from now on."""
        unsaid, self.unsaid = self.unsaid or [], None
        for router, step in unsaid:
            self._link.send(router, step)

    def leaving(self) -> None:
        """Announce a drain to every router that has work here."""
        for router in {sequence.router for sequence in self._running}:
            self._link.send(router, Leaving(done=False))

    def give_up(self, reason: str) -> None:
        """Fail everything that runs."""
        for sequence in self._running:
            self._link.send(sequence.router, Failed(sequence.request, sequence.attempt, reason))
        self._running.clear()

    async def _receive(self) -> None:
        while True:
            router, message = await self._link.receive()
            if isinstance(message, Ping):
                pong = Pong(message.seq, self.info.epoch, self.steps, self.load(), self._busy)
                self._link.send(router, pong)
                continue
            self.seen.append(message)
            match message:
                case Prefill() | Admit() if self.fail:
                    failed = Failed(message.request, message.attempt, self.fail)
                    self._link.send(router, failed)
                case Prefill() | Admit():
                    self._admit(router, message)
                case Cancel():
                    self._running = [
                        sequence
                        for sequence in self._running
                        if (sequence.request, sequence.attempt)
                        != (message.request, message.attempt)
                        or (message.choices and sequence.choice not in message.choices)
                    ]
                case Inspect() if self.mute:
                    continue
                case Inspect():
                    self._link.send(router, Inspected(message.seq, self._ledger()))
                case _:
                    raise AssertionError(message)

    def _admit(self, router: bytes, work: Prefill | Admit) -> None:
        prefills = isinstance(work, Prefill) or work.prefill is None
        for choice in work.choices:
            self._running.append(
                _Sequence(
                    work.request,
                    work.attempt,
                    choice,
                    unpack_tokens(work.tokens),
                    work.prompt_len,
                    work.params,
                    router,
                    self.cached_tokens if prefills else -1,
                    not prefills,
                    self.script,
                    prefills,
                )
            )
        self._wake.set()

    async def _run(self) -> None:
        while True:
            if not self._running:
                self._busy = False
                self._wake.clear()
                await self._wake.wait()
            self._busy = any(map(self._is_ready, self._running))
            await self.gate.wait()
            await asyncio.sleep(self.step_s)
            more = self._handoffs.more
            ready = [sequence for sequence in self._running if self._is_ready(sequence)]
            if ready:
                self._step(ready)
            elif self._running:
                self._wake.clear()
                waits = [asyncio.create_task(event.wait()) for event in (more, self._wake)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()

    def _is_ready(self, sequence: _Sequence) -> bool:
        if not sequence.awaits_kv:
            return True
        cached = self._handoffs.arrived.get((sequence.request, sequence.attempt))
        if cached is None:
            return False
        sequence.awaits_kv = False
        sequence.cached_tokens = cached
        return True

    def _step(self, ready: Sequence[_Sequence]) -> None:
        self.steps += 1
        outputs: dict[bytes, list[Output]] = {}
        prefilled: list[Output] = []
        for sequence in ready:
            output = sequence.step()
            outputs.setdefault(sequence.router, []).append(output)
            if self.info.role == "prefill":
                prefilled.append(output)
            if output.finish or self.info.role == "prefill":
                self._running.remove(sequence)
        for router, some in outputs.items():
            step = Step(tuple(some), self.load())
            if self.unsaid is None:
                self._link.send(router, step)
            else:
                self.unsaid.append((router, step))
        for output in prefilled:
            self._handoffs.add(output)
        if self.steps >= self.ends_at:
            self.gate.clear()

    def load(self) -> Load:
        tokens = sum(len(sequence.tokens) for sequence in self._running)
        return Load(running=len(self._running), kv_tokens=tokens, free_blocks=self.info.num_blocks)

    def _ledger(self) -> Ledger:
        return Ledger(
            num_blocks=self.info.num_blocks,
            free=self.info.num_blocks - len(self._running),
            cached=0,
            in_use=len(self._running),
            leased=0,
            receiving=0,
            draining=0,
            running=len(self._running),
        )
