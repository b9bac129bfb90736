"""A hand-made sender that speaks the protocol over plain sockets, also wrongly."""

import asyncio
import socket
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import zmq
import zmq.asyncio

from common.kv.shared import SharedBlocks
from kvtransfer import protocol
from kvtransfer import ucx_messages as m
from kvtransfer.commands import First, Key, Wanted
from kvtransfer.memory import digest
from kvtransfer.tcp_transport import PREFIX, split_address
from kvtransfer.ucx_transport import UcxListener, UcxOutlet
from tests.kvtransfer.node import FIRST, Node
from tests.kvtransfer.pool import BLOCK_SIZE, WIRE, identity

M = TypeVar("M")


class RawData(Protocol):
    """A data connection that sends whatever it is told to."""

    def connect(self, address: str) -> None: ...

    def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None: ...

    def close(self) -> None: ...


class RawZmq:
    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)

    def connect(self, address: str) -> None:
        self.socket.connect(address)

    def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None:
        self.socket.send_multipart([protocol.encode(header), *frames])

    def close(self) -> None:
        self.context.destroy(linger=0)


class RawTcp:
    def __init__(self) -> None:
        self.socket = socket.socket()

    def connect(self, address: str) -> None:
        self.socket.connect(split_address(address))

    def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None:
        head, body = protocol.encode(header), b"".join(frames)
        self.socket.sendall(PREFIX.pack(len(head), len(body)) + head + body)

    def close(self) -> None:
        self.socket.close()


class RawShm:
    """Its pool has a block for each frame of a message."""

    def __init__(self, block_bytes: int = 64, block_size: int = BLOCK_SIZE) -> None:
        self.shared = SharedBlocks(8, block_bytes)
        self.block_size = block_size
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def connect(self, address: str, fds: Sequence[int] | None = None) -> None:
        self.socket.connect("\0" + address.removeprefix("unix:@"))
        pool = protocol.encode(protocol.SharedPool(8, self.shared.block_bytes, self.block_size))
        socket.send_fds(self.socket, [pool], [self.shared.fd] if fds is None else fds)

    def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None:
        """Once the receiver has looked at them the blocks may be changed."""
        body = b"".join(frames)
        self.shared.blocks[: len(body)] = body
        sources = tuple(protocol.SharedBlock(i, 0) for i in range(len(header.blocks)))
        self.send(protocol.SharedHeader(header, sources))

    def send(self, message: protocol.SharedHeader) -> None:
        self.socket.send(protocol.encode(message))

    def close(self) -> None:
        self.socket.close()


class RawUcx:
    """Its helper is the real one; what it is told is not."""

    def __init__(self) -> None:
        self.shared = SharedBlocks(8, 64)
        self.loop = asyncio.new_event_loop()
        self.listener: UcxListener | None = None
        self.outlet: UcxOutlet | None = None

    def connect(self, address: str) -> None:
        self._run(self._connect(address))

    async def _connect(self, address: str) -> None:
        self.block_bytes = 64
        self.listener = await UcxListener.listen("127.0.0.1", self)
        self.outlet = await self.listener.connect(address, self)

    def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None:
        """Frames of any sizes, as one message."""
        assert self.listener is not None and self.outlet is not None
        body = b"".join(frames)
        self.shared.blocks[: len(body)] = body
        runs = ((0, len(body)),) if body else ()
        self.listener.tell(m.Ship(0, protocol.encode(header), runs))
        # The next message may use the pool when this one was read.
        self._run(self._shipped(self.outlet))

    async def _shipped(self, outlet: "UcxOutlet") -> None:
        await outlet.changed()

    def close(self) -> None:
        if self.listener is not None:
            self._run(self._close(self.listener))
        self.loop.close()

    async def _close(self, listener: "UcxListener") -> None:
        listener.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """In a loop of its own, in a thread of its own: the test runs in another one."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self.loop.run_until_complete, work).result()

    def slab(self, block: int) -> memoryview:
        return self.run(block, 1)

    def run(self, block: int, count: int) -> memoryview:
        return self.shared.blocks[block * 64 : (block + count) * 64]


RAW: dict[str, type[RawZmq] | type[RawTcp] | type[RawShm] | type[RawUcx]] = {
    "zmq": RawZmq,
    "tcp": RawTcp,
    "shm": RawShm,
    "ucx": RawUcx,
}


class RawSender:
    """Not connected to anything of ours but the receiver under test."""

    def __init__(self, context: zmq.asyncio.Context, target: Node, epoch: int = 99) -> None:
        """Sends data over the transport of `target`."""
        self.target = target
        self.me = identity("raw", epoch)
        self.control = context.socket(zmq.DEALER)
        self.control.connect(target.endpoint.address)
        self.transport = target.transport
        self.data: RawData = RAW[self.transport]()

    async def send(self, message: protocol.ToReceiver) -> None:
        await self.control.send(protocol.encode(message))

    async def receive(self, kind: type[M]) -> M:
        """The next answer of this kind; others are skipped."""
        while True:
            message = protocol.decode_for_sender(await self.control.recv())
            if isinstance(message, kind):
                return message

    async def greet(self) -> protocol.Welcome:
        await self.send(self.me.hello("tcp://127.0.0.1:1", (self.transport,)))
        welcome = await self.receive(protocol.Welcome)
        await asyncio.to_thread(self.data.connect, welcome.data[self.transport])
        return welcome

    def begin(self, key: Key, transfer: int, num_tokens: int, round: int = 0) -> protocol.Begin:
        return protocol.Begin(
            key=key,
            transfer=transfer,
            source_epoch=self.me.epoch,
            destination_epoch=self.target.epoch,
            num_tokens=num_tokens,
            round=round,
        )

    async def ticket(
        self, key: Key, transfer: int, slots: dict[int, int], generation: int = 5
    ) -> protocol.Ticket:
        """Greet, begin, and let the engine of the receiver grant these slots."""
        await self.greet()
        await self.send(self.begin(key, transfer, BLOCK_SIZE * len(slots)))
        await self.receive(protocol.Waiting)
        await self.target.events.next(Wanted)
        self.target.grant(key, slots, generation)
        return await self.receive(protocol.Ticket)

    def header(self, ticket: protocol.Ticket, contents: Sequence[bytes]) -> protocol.DataHeader:
        """What a right header would be for the first slots of the ticket."""
        blocks = tuple(
            protocol.DataBlock(
                slot.position, slot.block, slot.generation, BLOCK_SIZE, digest(memoryview(content))
            )
            for slot, content in zip(ticket.slots, contents, strict=False)
        )
        return protocol.DataHeader(
            ticket.transfer, ticket.secret, self.target.epoch, ticket.round, blocks, WIRE
        )

    async def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None:
        self.data.ship(header, frames)

    async def close(self, ticket: protocol.Ticket, first: tuple[First, ...] = FIRST) -> None:
        """Close, with a fence behind the data."""
        count = len(ticket.slots)
        await self.send(protocol.Close(ticket.transfer, ticket.round, count, first))
        await self.ship(self.header(ticket, ()), ())


@contextmanager
def raw_sender(target: Node, epoch: int = 99) -> Iterator[RawSender]:
    context = zmq.asyncio.Context()
    raw = RawSender(context, target, epoch)
    try:
        yield raw
    finally:
        raw.data.close()
        context.destroy(linger=0)
