"""What a receiver makes of wrong, damaged and repeated messages: nothing is written by them."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from kvtransfer import protocol
from kvtransfer.commands import Arrived, Grant, Key, Returned, Slot
from tests.kvtransfer.node import FIRST, TIMERS, Node, running
from tests.kvtransfer.pool import identity
from tests.kvtransfer.raw_sender import RawSender, RawZmq, raw_sender

KEY = Key(3, 1)
CONTENTS = [bytes([i]) * 64 for i in (1, 2)]


@dataclass
class Scene:
    """A receiver that granted slots 8 and 4 for the positions 0 and 1 to a raw sender."""

    node: Node
    raw: RawSender
    ticket: protocol.Ticket

    async def dropped(self, reason: str) -> None:
        """Wait until something was dropped for this reason, and nothing else was."""
        while not self.node.endpoint.stats().dropped:
            await asyncio.sleep(0.001)
        assert self.node.endpoint.stats().dropped == {reason: 1}
        assert not any(self.node.pool.memory)

    async def succeed(self) -> None:
        """The right messages still do."""
        await self.raw.ship(self.raw.header(self.ticket, CONTENTS), CONTENTS)
        await self.raw.close(self.ticket)
        await self.raw.receive(protocol.Ack)
        assert await self.node.events.next(Arrived) == Arrived(KEY, FIRST, 128)
        assert [self.node.pool.read(block) for block in (8, 4)] == CONTENTS


@pytest.fixture
async def scene(transport: str) -> AsyncIterator[Scene]:
    node = Node("d", 2)
    async with running(node):
        with raw_sender(node) as raw:
            yield Scene(node, raw, await raw.ticket(KEY, 11, {0: 8, 1: 4}))


async def test_the_right_messages(scene: Scene) -> None:
    await scene.succeed()
    assert not scene.node.endpoint.stats().dropped


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("transfer", {"transfer": 12}),
        ("secret", {"secret": bytes(16)}),
        ("secret", {"secret": b""}),
        ("epoch", {"destination_epoch": 3}),
        ("round", {"round": 2}),
        ("round", {"round": 0}),
    ],
)
async def test_a_wrong_header(scene: Scene, reason: str, wrong: dict[str, Any]) -> None:
    header = msgspec.structs.replace(scene.raw.header(scene.ticket, CONTENTS), **wrong)
    await scene.raw.ship(header, CONTENTS)
    await scene.dropped(reason)
    await scene.succeed()


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("generation", {"generation": 4}),
        ("generation", {"slot": 5}),
        ("generation", {"slot": 4}),  # granted, but for another position
        ("position", {"position": 2}),
        ("position", {"position": -1}),
        ("fill", {"fill": 15}),
    ],
)
async def test_a_wrong_block(scene: Scene, reason: str, wrong: dict[str, int]) -> None:
    header = scene.raw.header(scene.ticket, CONTENTS[:1])
    block = header.blocks[0]._replace(**wrong)
    await scene.raw.ship(msgspec.structs.replace(header, blocks=(block,)), CONTENTS[:1])
    await scene.dropped(reason)
    await scene.succeed()


@pytest.mark.parametrize("transport", ["tcp", "zmq"], indirect=True)
async def test_too_few_bytes_and_too_many(scene: Scene) -> None:
    header = scene.raw.header(scene.ticket, CONTENTS)
    await scene.raw.ship(header, CONTENTS[:1])
    await scene.dropped("size")
    await scene.raw.ship(header, [*CONTENTS, CONTENTS[0]])
    while scene.node.endpoint.stats().dropped["size"] < 2:
        await asyncio.sleep(0.001)
    await scene.succeed()


@pytest.mark.parametrize("transport", ["zmq"], indirect=True)
@pytest.mark.parametrize(
    "frames", [[b"\xc1 is no msgpack"], [b""], [b"\x90"], [b"\x95\x01\x02\x03\x04\x05"]]
)
async def test_a_malformed_data_message(scene: Scene, frames: list[bytes]) -> None:
    assert isinstance(scene.raw.data, RawZmq)
    scene.raw.data.socket.send_multipart(frames)
    await scene.dropped("malformed")
    await scene.succeed()


@pytest.mark.parametrize("transport", ["zmq"], indirect=True)
async def test_a_frame_that_is_no_whole_block(scene: Scene) -> None:
    await scene.raw.ship(scene.raw.header(scene.ticket, CONTENTS[:1]), [bytes(63)])
    await scene.dropped("malformed")
    await scene.succeed()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa4type\xa4nope", b"\x81\xa4type\xa3ack"])
async def test_a_malformed_control_message(scene: Scene, data: bytes) -> None:
    await scene.raw.control.send(data)
    await scene.dropped("malformed")
    await scene.succeed()


async def test_a_flipped_bit_is_asked_for_again(scene: Scene) -> None:
    damaged = bytes([CONTENTS[1][0] ^ 4]) + CONTENTS[1][1:]
    await scene.raw.ship(scene.raw.header(scene.ticket, CONTENTS), [CONTENTS[0], damaged])
    assert await scene.raw.receive(protocol.Landed) == protocol.Landed(11, (0,))
    await scene.raw.close(scene.ticket)
    again = await scene.raw.receive(protocol.Ticket)
    assert (again.round, again.secret) == (2, scene.ticket.secret)
    assert again.slots == (Slot(1, 4, 5),)
    assert scene.node.endpoint.stats().digest_errors == 1
    await scene.raw.ship(scene.raw.header(again, CONTENTS[1:]), CONTENTS[1:])
    await scene.raw.receive(protocol.Ack)
    assert await scene.node.events.next(Arrived) == Arrived(KEY, FIRST, 128)


async def test_every_round_damaged(scene: Scene) -> None:
    ticket = scene.ticket
    good = scene.raw.header(ticket, CONTENTS)
    await scene.raw.ship(good, [CONTENTS[0], bytes(64)])
    for round in (2, 3):
        await scene.raw.close(ticket)
        ticket = await scene.raw.receive(protocol.Ticket)
        assert ticket.round == round
        await scene.raw.ship(scene.raw.header(ticket, CONTENTS[1:]), [bytes(64)])
    await scene.raw.close(ticket)
    assert await scene.raw.receive(protocol.Nack) == protocol.Nack(11, "incomplete")
    assert await scene.node.events.next(Returned) == Returned(KEY, (0,), "incomplete")


async def test_a_block_lands_once(scene: Scene) -> None:
    header = scene.raw.header(scene.ticket, CONTENTS)
    await scene.raw.ship(header, CONTENTS)
    await scene.raw.receive(protocol.Landed)
    other = [bytes(64), bytes(64)]
    await scene.raw.ship(scene.raw.header(scene.ticket, other), other)
    again = await scene.raw.receive(protocol.Landed)  # the first answer may have been lost
    assert again == protocol.Landed(11, (0, 1))
    assert [scene.node.pool.read(block) for block in (8, 4)] == CONTENTS
    assert scene.node.endpoint.stats().dropped == {"landed": 2}


async def test_nothing_is_written_after_the_end(scene: Scene) -> None:
    await scene.succeed()
    other = [bytes(64), bytes(64)]
    await scene.raw.ship(scene.raw.header(scene.ticket, other), other)
    while not scene.node.endpoint.stats().dropped["transfer"]:
        await asyncio.sleep(0.001)
    assert [scene.node.pool.read(block) for block in (8, 4)] == CONTENTS
    await scene.raw.close(scene.ticket)  # its Ack may have been lost
    await scene.raw.receive(protocol.Ack)
    await scene.raw.send(scene.raw.begin(KEY, 11, 32, round=1))
    await scene.raw.receive(protocol.Ack)
    await scene.raw.send(scene.raw.begin(KEY, 12, 32))  # the same attempt anew
    assert await scene.raw.receive(protocol.Nack) == protocol.Nack(12, "gone")
    assert scene.node.events.empty()


async def test_tickets_are_idempotent(scene: Scene) -> None:
    await scene.raw.send(scene.raw.begin(KEY, 11, 32))
    again = await scene.raw.receive(protocol.Ticket)
    # The leases may have been renewed meanwhile.
    assert msgspec.structs.replace(again, renewal=scene.ticket.renewal) == scene.ticket
    await scene.raw.ship(scene.raw.header(scene.ticket, CONTENTS), CONTENTS[:1] + CONTENTS[1:])
    await scene.raw.receive(protocol.Landed)
    await scene.raw.send(scene.raw.begin(KEY, 11, 32, round=1))
    again = await scene.raw.receive(protocol.Ticket)
    assert (again.round, again.slots) == (2, ())


async def test_a_begin_of_another_life(scene: Scene) -> None:
    wrong = msgspec.structs.replace(scene.raw.begin(Key(4, 1), 20, 16), destination_epoch=1)
    await scene.raw.send(wrong)
    assert await scene.raw.receive(protocol.Nack) == protocol.Nack(20, "epoch")
    wrong = msgspec.structs.replace(scene.raw.begin(Key(4, 1), 20, 16), source_epoch=1)
    await scene.raw.send(wrong)
    await scene.dropped("begin")
    assert scene.node.endpoint.stats().receiving == 1


async def test_others_cannot_end_or_take_over_a_transfer(scene: Scene) -> None:
    with raw_sender(scene.node) as other:
        other.me = identity("other", 98)
        await other.greet()
        await other.send(protocol.AbortTransfer(11, "forged"))
        await scene.dropped("source")
        await other.send(protocol.Close(11, 1, 2, FIRST))
        await other.send(other.begin(KEY, 11, 32))
        while scene.node.endpoint.stats().dropped["source"] < 3:
            await asyncio.sleep(0.001)
        await other.send(other.begin(KEY, 21, 32))
        assert await other.receive(protocol.Nack) == protocol.Nack(21, "gone")
    await scene.succeed()


async def test_a_stranger_is_asked_for_hello(scene: Scene) -> None:
    with raw_sender(scene.node) as other:
        await other.send(other.begin(Key(5, 1), 30, 16))
        assert (await other.receive(protocol.Refused)).reason == "unknown"
    await scene.succeed()


async def test_a_new_life_of_the_sender_ends_the_old_one(scene: Scene) -> None:
    with raw_sender(scene.node, epoch=100) as reborn:
        await reborn.greet()
        assert await scene.node.events.next(Returned) == Returned(KEY, (), "peer")
        await scene.raw.ship(scene.raw.header(scene.ticket, CONTENTS), CONTENTS)
        await scene.dropped("transfer")
        await reborn.send(reborn.begin(Key(3, 2), 40, 16))
        await reborn.receive(protocol.Waiting)


async def test_a_late_hello_of_an_old_life_changes_nothing(scene: Scene) -> None:
    with raw_sender(scene.node, epoch=98) as old:
        greeting = asyncio.ensure_future(old.greet())
        for step in itertools.count(1):
            await asyncio.sleep(TIMERS.heartbeat_s / 4)
            await scene.raw.send(protocol.Progress(step, 0.0))
            if step >= 8 and greeting.done():
                break
        await greeting
        await scene.succeed()


async def test_a_reconnected_sender_goes_on(scene: Scene) -> None:
    await scene.raw.ship(scene.raw.header(scene.ticket, CONTENTS[:1]), CONTENTS[:1])
    await scene.raw.receive(protocol.Landed)
    with raw_sender(scene.node) as again:  # the same epoch over a new connection
        await again.greet()
        await again.send(again.begin(KEY, 11, 32, round=1))
        ticket = await again.receive(protocol.Ticket)
        assert (ticket.round, ticket.slots) == (2, (Slot(1, 4, 5),))
        await again.ship(again.header(ticket, CONTENTS[1:]), CONTENTS[1:])
        await again.close(ticket)
        await again.receive(protocol.Ack)
        assert await scene.node.events.next(Arrived) == Arrived(KEY, FIRST, 128)


async def test_an_abort_may_overtake_its_begin(scene: Scene) -> None:
    await scene.raw.send(protocol.AbortTransfer(50, "cancel"))
    await scene.raw.send(scene.raw.begin(Key(6, 1), 50, 16))
    assert await scene.raw.receive(protocol.Nack) == protocol.Nack(50, "gone")
    assert scene.node.events.empty()


async def test_a_sender_that_never_comes_back_is_given_up(transport: str) -> None:
    node = Node("d", 2)
    async with running(node):
        with raw_sender(node) as raw:
            await raw.ticket(KEY, 11, {0: 8})
            await raw.send(raw.begin(Key(3, 2), 12, 16))
            await raw.receive(protocol.Waiting)
        ended = [await node.events.next(Returned, 3 * TIMERS.stall_s) for _ in range(2)]
        assert {event.key for event in ended} == {KEY, Key(3, 2)}
        assert {event.reason for event in ended} <= {"peer", "stalled"}
        node.endpoint.command(Grant(Key(3, 2), (Slot(0, 9, 1),)))  # crosses its Returned
        assert node.events.empty()
        node.endpoint.command(Grant(Key(77, 1), (Slot(0, 9, 1),)))  # never asked for
        assert await node.events.next(Returned, 0) == Returned(Key(77, 1), (), "gone")
