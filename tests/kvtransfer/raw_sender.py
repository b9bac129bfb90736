"""A hand-made sender that speaks the protocol over plain sockets, also wrongly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import zmq
import zmq.asyncio

from kvtransfer import protocol
from kvtransfer.commands import First, Key, Wanted
from kvtransfer.memory import digest
from tests.kvtransfer.node import FIRST, Node
from tests.kvtransfer.pool import BLOCK_SIZE, identity

M = TypeVar("M")


class RawSender:
    """Not connected to anything of ours but the receiver under test."""

    def __init__(self, context: zmq.asyncio.Context, target: Node, epoch: int = 99) -> None:
        self.target = target
        self.me = identity("raw", epoch)
        self.control = context.socket(zmq.DEALER)
        self.control.connect(target.endpoint.address)
        self.data = context.socket(zmq.DEALER)

    async def send(self, message: protocol.ToReceiver) -> None:
        await self.control.send(protocol.encode(message))

    async def receive(self, kind: type[M]) -> M:
        """The next answer of this kind; others are skipped."""
        while True:
            message = protocol.decode_for_sender(await self.control.recv())
            if isinstance(message, kind):
                return message

    async def greet(self) -> protocol.Welcome:
        await self.send(self.me.hello("tcp://127.0.0.1:1", ("zmq",)))
        welcome = await self.receive(protocol.Welcome)
        self.data.connect(welcome.data["zmq"])
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
            ticket.transfer, ticket.secret, self.target.epoch, ticket.round, blocks
        )

    async def ship(self, header: protocol.DataHeader, frames: Sequence[bytes]) -> None:
        await self.data.send_multipart([protocol.encode(header), *frames])

    async def close(self, ticket: protocol.Ticket, first: tuple[First, ...] = FIRST) -> None:
        """Close, with a fence behind the data."""
        count = len(ticket.slots)
        await self.send(protocol.Close(ticket.transfer, ticket.round, count, first))
        await self.ship(self.header(ticket, ()), ())


@contextmanager
def raw_sender(target: Node, epoch: int = 99) -> Iterator[RawSender]:
    context = zmq.asyncio.Context()
    try:
        yield RawSender(context, target, epoch)
    finally:
        context.destroy(linger=0)
