"""Messages survive the way over the wire; anything else is a ProtocolError."""

import random

import msgspec
import pytest

from common.errors import ProtocolError
from common.messages import Peer, TokenLogprob
from kvtransfer import protocol as p
from kvtransfer.commands import First, Key, Slot
from tests.kvtransfer.pool import LAYOUT, WIRE, identity

TO_RECEIVER: list[p.ToReceiver] = [
    identity("a", (1 << 63) - 1).hello("tcp://127.0.0.1:1", ("tcp",)),
    p.Begin(key=Key(1, 2), transfer=3, source_epoch=4, destination_epoch=5, num_tokens=6, round=0),
    p.Progress(7, 0.5),
    p.Close(8, 1, 2, (First(0, 9, None), First(1, 10, TokenLogprob(10, -0.5, ((10, -0.5),))))),
    p.AbortTransfer(11, "cancel"),
    p.Fetch(Key(1, 2), bytes(32)),
]
TO_SENDER: list[p.ToSender] = [
    p.Welcome(id="b", epoch=1, window=2, wire=WIRE, data={"zmq": "tcp://127.0.0.1:2"}),
    p.Refused("layout", "why"),
    p.Declined(Key(1, 2), "gone"),
    p.Waiting(1),
    p.Ticket(1, 2, bytes(16), 3, (Slot(0, 5, 6), Slot(1, 7, 8))),
    p.Nack(1, "gone"),
    p.Landed(1, (0, 2)),
    p.Ack(1),
    p.Renew(1, (2, 3), 4),
]
HEADER = p.DataHeader(1, bytes(16), 2, 1, (p.DataBlock(0, 5, 6, 16, (1 << 64) - 1),), WIRE)
LAST = p.DataHeader(1, bytes(16), 2, 1, HEADER.blocks, WIRE, p.End.of((First(0, 9, None),)))


@pytest.mark.parametrize("message", TO_RECEIVER, ids=lambda message: type(message).__name__)
def test_to_receiver(message: p.ToReceiver) -> None:
    assert p.decode_for_receiver(p.encode(message)) == message
    with pytest.raises(ProtocolError):
        p.decode_for_sender(p.encode(message))


@pytest.mark.parametrize("message", TO_SENDER, ids=lambda message: type(message).__name__)
def test_to_sender(message: p.ToSender) -> None:
    assert p.decode_for_sender(p.encode(message)) == message
    with pytest.raises(ProtocolError):
        p.decode_for_receiver(p.encode(message))


@pytest.mark.parametrize("header", [HEADER, LAST])
def test_header(header: p.DataHeader) -> None:
    assert p.decode_header(memoryview(p.encode(header))) == header


def test_the_first_tokens_of_a_header() -> None:
    first = (First(0, 9, None, 5), First(1, 10, None))
    end = p.End.of(first)
    assert end.read() == first
    for i in range(len(end.first)):
        damaged = bytearray(end.first)
        damaged[i] ^= 1
        assert p.End(bytes(damaged), end.digest).read() is None
    assert p.End(b"", p.End.of(()).digest).read() is None


def test_damaged_bytes_are_a_message_or_a_protocol_error() -> None:
    draw = random.Random(1)
    for message in [*TO_RECEIVER, *TO_SENDER, HEADER, LAST]:
        for _ in range(300):
            data = bytearray(p.encode(message))
            for _ in range(draw.randint(1, 3)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            for decode in (p.decode_for_receiver, p.decode_for_sender, p.decode_header):
                try:
                    decode(bytes(data[: draw.randint(0, len(data))]))
                except ProtocolError:
                    continue


def test_who_may_exchange_blocks() -> None:
    me, you = identity("a", 1), identity("b", 2)
    hello = you.hello("tcp://127.0.0.1:1", ("tcp",))
    assert hello.source == Peer("b", 2, "tcp://127.0.0.1:1") and hello.layout == LAYOUT
    assert me.refusal(hello) is None
    for field, value, reason in (
        ("version", 1, "version"),
        ("content_id", "other", "content"),
        ("layout", msgspec.structs.replace(LAYOUT, dtype="bfloat16"), "layout"),
        ("layout", msgspec.structs.replace(LAYOUT, first_kv_head=2), "layout"),
        ("layout", msgspec.structs.replace(LAYOUT, block_size=24), "layout"),
    ):
        refused = me.refusal(msgspec.structs.replace(hello, **{field: value}))
        assert refused is not None and refused.reason == reason
    other_size = msgspec.structs.replace(LAYOUT, block_size=48)
    assert me.refusal(msgspec.structs.replace(hello, layout=other_size)) is None
