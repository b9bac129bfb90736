"""Engines of both roles in one process, connected by hand: no network, no threads, no clock.

`Pair` plays the router's link, the two transfer endpoints and the I/O threads. Every step of the
wire is one `move`, in an order that the test (or its random generator) chooses, so that cancels
and deliveries cross at every stage.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.blockhash import pack_tokens
from common.engine import Engine
from common.events import Fence, Fenced, FromRouter, Send, Ship
from common.messages import (
    Admit,
    Cancel,
    Failed,
    Output,
    Peer,
    Prefill,
    Step,
)
from common.sampling import SamplingParams
from decode.engine import DecodeEngine
from kvtransfer.commands import (
    Abort,
    Arrived,
    BlockRef,
    Broken,
    Close,
    Delivered,
    First,
    Grant,
    Key,
    Offer,
    Open,
    ReceiverCommand,
    Refuse,
    Returned,
    Revoke,
    SenderCommand,
    Slot,
    Ticketed,
    Wait,
    Wanted,
)
from kvtransfer.memory import BlockMemory
from prefill.engine import PrefillEngine

ROUTER = b"router"
P_PEER = Peer("p0", 1, "inproc://p0")
D_PEER = Peer("d0", 2, "inproc://d0")


@dataclass
class Transfer:
    """One transfer as both endpoints together see it."""

    offered: dict[int, BlockRef] = field(default_factory=dict)
    slots: dict[int, Slot] | None = None
    landed: set[int] = field(default_factory=set)
    first: tuple[First, ...] | None = None


class Wire:
    """The two transfer endpoints: what they were told and what they answer."""

    def __init__(self, source: BlockMemory, target: BlockMemory) -> None:
        self.source = source
        self.target = target
        self.transfers: dict[Key, Transfer] = {}
        self.to_prefill: deque[object] = deque()
        self.to_decode: deque[object] = deque()
        self.num_shipped = 0

    def command(self, command: SenderCommand | ReceiverCommand) -> None:
        key = command.key
        transfer = self.transfers.get(key)
        match command:
            case Open(_, peer, num_tokens):
                assert peer == D_PEER and transfer is None, command
                self.transfers[key] = Transfer()
                self.to_decode.append(Wanted(key, P_PEER, num_tokens))
            case _ if transfer is None:
                pass  # it ended; its last event is on the way
            case Offer(_, refs):
                transfer.offered |= {ref.position: ref for ref in refs}
                self._ship(key, transfer)
            case Close(_, first):
                transfer.first = first
                self._ship(key, transfer)
            case Abort(_, reason):
                self._end(key, transfer, "finished" if reason == "finished" else "aborted")
            case Grant(_, slots):
                assert transfer.slots is None, command
                transfer.slots = {slot.position: slot for slot in slots}
                self.to_prefill.append(Ticketed(key, len(slots)))
                self._ship(key, transfer)
            case Wait():
                assert transfer.slots is None, command
            case Refuse(_, reason):
                assert transfer.slots is None, command
                del self.transfers[key]
                self.to_prefill.append(Broken(key, "refused", reason))
            case Revoke():
                self._end(key, transfer, "revoked")
                self.to_prefill.append(Broken(key, "refused", "gone"))

    def lose(self, key: Key) -> None:
        """The network fails for this transfer; both sides notice."""
        transfer = self.transfers.get(key)
        if transfer is not None:
            self._end(key, transfer, "stalled")
            self.to_prefill.append(Broken(key, "stalled", "lost by the test"))

    def _end(self, key: Key, transfer: Transfer, reason: str) -> None:
        del self.transfers[key]
        self.to_decode.append(Returned(key, tuple(sorted(transfer.landed)), reason))

    def _ship(self, key: Key, transfer: Transfer) -> None:
        if transfer.slots is None:
            return
        for position in transfer.slots.keys() & transfer.offered.keys() - transfer.landed:
            slot, ref = transfer.slots[position], transfer.offered[position]
            self.target.slab(slot.block)[:] = self.source.slab(ref.block)
            transfer.landed.add(position)
            self.num_shipped += 1
        if transfer.first is not None and transfer.landed == transfer.slots.keys():
            num_bytes = len(transfer.landed) * self.target.block_bytes
            self.to_decode.append(Arrived(key, transfer.first, num_bytes))
            self.to_prefill.append(Delivered(key, len(transfer.landed), num_bytes))
            del self.transfers[key]


@dataclass
class Stream:
    """What the router knows of one choice: tokens in order, each index once."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    cached: int = -1


class Pair:
    """A prefill and a decode engine, the wire between them, and a router that reads."""

    def __init__(
        self, prefill: PrefillEngine | None, decode: DecodeEngine, wire: Wire | None
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.wire = wire
        self.now = 0.0
        self.streams: dict[tuple[int, int, int], Stream] = {}
        self.failed: dict[tuple[int, int], str] = {}
        self._inboxes: dict[Engine, deque[object]] = {e: deque() for e in self.engines}
        self._outboxes: dict[Engine, deque[object]] = {e: deque() for e in self.engines}

    @property
    def engines(self) -> Sequence[Engine]:
        return [e for e in (self.prefill, self.decode) if e is not None]

    # ------------------------------------------------------------ the router

    def submit(
        self,
        request: int,
        tokens: list[int],
        params: SamplingParams,
        *,
        attempt: int = 0,
        prompt_len: int | None = None,
        choices: tuple[int, ...] = (0,),
        local: bool = False,
    ) -> None:
        work = {
            "request": request,
            "attempt": attempt,
            "tokens": pack_tokens(tokens),
            "prompt_len": prompt_len or len(tokens),
            "choices": choices,
            "params": params,
        }
        if local or self.prefill is None:
            self.send(self.decode, Admit(**work))  # type: ignore[arg-type]
            return
        alone = params.max_tokens == len(tokens) - (prompt_len or len(tokens)) + 1
        peer = None if alone else D_PEER
        self.send(self.prefill, Prefill(**work, decode=peer))  # type: ignore[arg-type]
        if not alone:
            self.send(self.decode, Admit(**work, prefill=P_PEER))  # type: ignore[arg-type]

    def cancel(self, request: int, attempt: int = 0, choices: tuple[int, ...] = ()) -> None:
        for engine in self.engines:
            self.send(engine, Cancel(request, attempt, choices))

    def send(self, engine: Engine, message: Prefill | Admit | Cancel) -> None:
        self._inboxes[engine].append(FromRouter(ROUTER, message))

    def _read(self, message: object) -> None:
        if isinstance(message, Failed):
            self.failed.setdefault((message.request, message.attempt), message.reason)
        elif isinstance(message, Step):
            for output in message.outputs:
                self._read_output(output)

    def _read_output(self, output: Output) -> None:
        key = (output.request, output.attempt, output.choice)
        stream = self.streams.setdefault(key, Stream())
        if output.cached_tokens >= 0:
            stream.cached = output.cached_tokens
        for i, token in enumerate(output.tokens, output.index):
            first = stream.tokens[i : i + 1]
            assert i <= len(stream.tokens) and first in ([], [token]), (output, stream)
            if not first:
                stream.tokens.append(token)
        stream.finish = stream.finish or output.finish

    # ------------------------------------------------------------ moves

    def moves(self) -> list[Callable[[], None]]:
        """Everything that could happen next; each keeps its own order."""
        found: list[Callable[[], None]] = []
        for engine in self.engines:
            if self._inboxes[engine]:
                found.append(lambda e=engine: self._deliver(e))  # type: ignore[misc]
            if self._outboxes[engine]:
                found.append(lambda e=engine: self._carry(e))  # type: ignore[misc]
        if self.wire is not None and self.wire.to_prefill and self.prefill is not None:
            found.append(lambda: self._hand(self.wire.to_prefill, self.prefill))  # type: ignore
        if self.wire is not None and self.wire.to_decode:
            found.append(lambda: self._hand(self.wire.to_decode, self.decode))  # type: ignore
        return found

    def turn(self, engine: Engine) -> bool:
        """One turn of an engine loop; False if it had nothing to compute."""
        engine.expire(self.now)
        batch = engine.next_batch()
        self._outboxes[engine].extend(engine.flush())
        if batch:
            engine.settle(batch, engine.step(batch))
            self._outboxes[engine].extend(engine.flush())
        engine.blocks.check()
        return bool(batch)

    def run(self, limit: int = 10_000) -> None:
        """Until nothing moves any more."""
        for _ in range(limit):
            while moves := self.moves():
                moves[0]()
            if not any([self.turn(engine) for engine in self.engines]) and not self.moves():
                return
        raise AssertionError(f"still moving after {limit} turns")

    def _deliver(self, engine: Engine) -> None:
        engine.take(self._inboxes[engine].popleft(), self.now)

    def _hand(self, events: deque[object], engine: Engine) -> None:
        engine.take(events.popleft(), self.now)

    def _carry(self, engine: Engine) -> None:
        match self._outboxes[engine].popleft():
            case Send(_, message):
                self._read(message)
            case Ship(command):
                assert self.wire is not None
                self.wire.command(command)
            case Fence(attempt):
                self._inboxes[engine].append(Fenced(attempt))

    # ------------------------------------------------------------ what must hold

    def assert_quiet(self) -> None:
        """Nothing is held anywhere: the ledgers balance with free and cached blocks alone."""
        for engine in self.engines:
            engine.blocks.check()
            ledger = engine.blocks.ledger(engine.num_held())
            assert engine.idle(), engine
            assert ledger.balanced and ledger.running == 0, ledger
            assert ledger.free + ledger.cached == ledger.num_blocks, ledger
