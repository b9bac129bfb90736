"""The receiver as a state machine, driven by hand with a fake clock."""

from random import Random

import pytest

from common.config import TimerConfig
from kvtransfer import protocol as p
from kvtransfer.commands import Arrived, Grant, Key, Slot
from kvtransfer.incoming import Landing
from kvtransfer.receiver import Receiver
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from tests.kvtransfer.node import FIRST
from tests.kvtransfer.pool import BLOCK_SIZE, WIRE, identity

TIMERS = Timers.of(TimerConfig())
END = p.End.of(FIRST)


def greet(receiver: Receiver, number: int) -> p.Welcome:
    """A sender says Hello and gets a ticket for a transfer."""
    route = b"%d" % number
    me = identity(f"p{number}", number)
    receiver.message(route, me.hello("address", ("tcp", "zmq")), 0.0)
    [(_, welcome)] = receiver.outbox
    assert isinstance(welcome, p.Welcome)
    begin = p.Begin(
        key=Key(number, 1),
        transfer=number,
        source_epoch=number,
        destination_epoch=1,
        num_tokens=BLOCK_SIZE,
        round=0,
    )
    receiver.message(route, begin, 0.0)
    receiver.command(Grant(Key(number, 1), ()), 0.0)
    receiver.outbox.clear()
    return welcome


def make(*transports: str) -> Receiver:
    receiver = Receiver(identity("d", 1), 64, TIMERS, TransferStats(), Random(0))
    receiver.data = {name: f"address of {name}" for name in transports}
    return receiver


def test_all_senders_together_stay_within_the_window_of_the_worker() -> None:
    receiver = make("zmq")
    windows = [greet(receiver, number).window for number in range(1, 17)]
    assert windows == [32 << 20] * 9 + [(256 << 20) // n for n in range(9, 16)]
    receiver.tick(1.0)
    renewed = [message for _, message in receiver.outbox if isinstance(message, p.Renew)]
    assert [renew.window for renew in renewed] == [16 << 20] * 16
    for number in range(1, 9):
        receiver.message(b"%d" % number, p.AbortTransfer(number, "cancel"), 1.5)
    receiver.outbox.clear()
    receiver.tick(2.0)
    renewed = [message for _, message in receiver.outbox if isinstance(message, p.Renew)]
    assert [renew.window for renew in renewed] == [32 << 20] * 8


def test_only_transports_of_both_sides_are_told() -> None:
    assert greet(make("shm", "zmq"), 1).data == {"zmq": "address of zmq"}
    receiver = make("shm")
    receiver.message(b"1", identity("p1", 1).hello("address", ("tcp", "zmq")), 0.0)
    refused = p.Refused("transport", "tcp, zmq of the sender, shm here")
    assert list(receiver.outbox) == [(b"1", refused)]


def test_slow_is_no_stall() -> None:
    """A transfer waits behind the blocks of another one of the same sender, for as long as those
    land; the sender's engine has nothing to do meanwhile, and makes no step."""
    receiver = make("tcp")
    greet(receiver, 1)
    for number in (2, 3):
        begin = p.Begin(
            key=Key(number, 1),
            transfer=number,
            source_epoch=1,
            destination_epoch=1,
            num_tokens=4 * BLOCK_SIZE,
            round=0,
        )
        receiver.message(b"1", begin, 0.0)
        slots = tuple(Slot(position, 4 * number + position, 1) for position in range(4))
        receiver.command(Grant(Key(number, 1), slots), 0.0)
    ticket = next(m for _, m in receiver.outbox if isinstance(m, p.Ticket) and m.transfer == 2)
    now = 0.0
    for position, slot, generation in ticket.slots:
        now += 0.8 * TIMERS.stall_s
        block = p.DataBlock(position, slot, generation, BLOCK_SIZE, 5)
        header = p.DataHeader(2, ticket.secret, 1, 1, (block,), WIRE)
        landing = receiver.accept(header, 64, now)
        assert landing is not None
        receiver.landed(landing, [5], now)
        receiver.tick(now)
    receiver.tick(now + 0.9 * TIMERS.stall_s)
    assert receiver.num_live == 3
    receiver.tick(now + 1.1 * TIMERS.stall_s)
    assert receiver.num_live == 0


def begin(number: int, num_blocks: int, round: int = 0) -> p.Begin:
    """Of sender 1."""
    return p.Begin(
        key=Key(number, 1),
        transfer=number,
        source_epoch=1,
        destination_epoch=1,
        num_tokens=num_blocks * BLOCK_SIZE,
        round=round,
    )


def said(receiver: Receiver) -> list[p.ToSender]:
    messages = [message for _, message in receiver.outbox]
    receiver.outbox.clear()
    return messages


def granted(num_blocks: int) -> tuple[Receiver, p.Ticket]:
    """A receiver that gave a ticket for transfer 2 of sender 1."""
    receiver = make("tcp")
    greet(receiver, 1)
    receiver.message(b"1", begin(2, num_blocks), 0.0)
    slots = tuple(Slot(position, 10 + position, 1) for position in range(num_blocks))
    receiver.command(Grant(Key(2, 1), slots), 0.0)
    [ticket] = said(receiver)
    assert isinstance(ticket, p.Ticket)
    return receiver, ticket


def data(ticket: p.Ticket, *positions: int, end: p.End | None = None) -> p.DataHeader:
    """A message of these blocks, whose digests are 5."""
    slots = {slot.position: slot for slot in ticket.slots}
    blocks = tuple(p.DataBlock(i, slots[i].block, 1, BLOCK_SIZE, 5) for i in positions)
    return p.DataHeader(ticket.transfer, ticket.secret, 1, ticket.round, blocks, WIRE, end)


def accept(receiver: Receiver, header: p.DataHeader, now: float = 0.0) -> Landing:
    landing = receiver.accept(header, 64 * len(header.blocks), now)
    assert landing is not None
    return landing


def land(receiver: Receiver, header: p.DataHeader) -> None:
    receiver.landed(accept(receiver, header), [5] * len(header.blocks), 0.0)


def test_the_last_message_says_what_close_would() -> None:
    receiver, ticket = granted(2)
    land(receiver, data(ticket, 0))
    assert said(receiver) == [p.Landed(2, (0,))]
    land(receiver, data(ticket, 1, end=END))
    assert said(receiver) == [p.Ack(2)]
    assert receiver.events[-1] == Arrived(Key(2, 1), FIRST, 128)
    receiver.message(b"1", p.Close(2, 1, 2, FIRST), 0.5)  # the Ack was lost
    assert said(receiver) == [p.Ack(2)]


def test_what_did_not_come_before_the_last_message_is_asked_for_again() -> None:
    receiver, ticket = granted(3)
    land(receiver, data(ticket, 1))
    last = data(ticket, 2, end=END)
    land(receiver, last)
    again = p.Ticket(2, 2, ticket.secret, 0, ticket.slots[:1])
    assert said(receiver) == [p.Landed(2, (1,)), p.Landed(2, (2,)), again]
    assert receiver.accept(last, 64, 0.0) is None  # doubled: it is the end of the round before
    assert said(receiver) == [p.Landed(2, (2,))]
    land(receiver, data(again, 0, end=END))
    assert said(receiver) == [p.Ack(2)]
    assert receiver.events[-1] == Arrived(Key(2, 1), FIRST, 3 * 64)


def test_an_end_of_an_earlier_round_is_not_the_end_of_this_one() -> None:
    """The sender asked for another round while its last message was on the way."""
    receiver, ticket = granted(2)
    receiver.message(b"1", begin(2, 2, round=1), 0.0)
    [again] = said(receiver)
    assert again == p.Ticket(2, 2, ticket.secret, 0, ticket.slots)
    land(receiver, data(ticket, 1, end=END))
    assert said(receiver) == [p.Landed(2, (1,))]
    land(receiver, data(ticket, 0))
    assert said(receiver) == [p.Ack(2)]


def test_first_tokens_that_were_damaged_are_not_believed() -> None:
    receiver, ticket = granted(2)
    land(receiver, data(ticket, 0, 1, end=p.End(END.first[:-1] + b"\0", END.digest)))
    assert said(receiver) == [p.Landed(2, (0, 1))]
    assert receiver._stats.digest_errors == 1
    receiver.message(b"1", p.Close(2, 1, 2, FIRST), 0.5)
    assert said(receiver) == [p.Ack(2)]
    assert receiver.events[-1] == Arrived(Key(2, 1), FIRST, 128)


def test_a_copy_that_fails_after_the_last_message_is_asked_for_again() -> None:
    """Blocks that are copied at this moment are not missing, until they turn out to be."""
    receiver, ticket = granted(2)
    slow = accept(receiver, data(ticket, 0))
    land(receiver, data(ticket, 1, end=END))
    assert said(receiver) == [p.Landed(2, (1,))]
    receiver.landed(slow, [6], 0.0)
    again = p.Ticket(2, 2, ticket.secret, 0, ticket.slots[:1])
    assert said(receiver) == [p.Landed(2, ()), again]


def test_a_transfer_without_a_ticket_is_told_to_wait_once_for_each_question() -> None:
    receiver = make("tcp")
    greet(receiver, 1)

    def told(now: float) -> int:
        receiver.tick(now)
        return sum(isinstance(message, p.Waiting) for message in said(receiver))

    for now in (0.0, 0.5):
        receiver.message(b"1", begin(2, 1), now)
        assert not said(receiver)  # the ticket may come in a moment
        assert [told(now + 0.1), told(now + 0.2)] == [1, 0]
    receiver.message(b"1", begin(2, 1), 1.0)
    receiver.command(Grant(Key(2, 1), (Slot(0, 10, 1),)), 1.0)
    assert told(1.1) == 0


@pytest.mark.parametrize("how", ["header", "close"])
def test_what_was_computed_for_long_may_still_be_on_its_way(how: str) -> None:
    """Nothing moved since the ticket, and the sender's engine made steps all the time: from its
    last word on the blocks have as long as ever."""
    receiver, ticket = granted(1)
    now = 0.0
    while now < 3 * TIMERS.stall_s:
        now += 1.0
        receiver.message(b"1", p.Progress(int(now), 0.1), now)
        receiver.tick(now)
    if how == "close":
        receiver.message(b"1", p.Close(2, 1, 1, FIRST), now)
        receiver.tick(now + 0.1)
    landing = accept(receiver, data(ticket, 0, end=END), now + 0.2)
    receiver.tick(now + 0.3)
    receiver.landed(landing, [5], now + 0.4)
    assert receiver.events[-1] == Arrived(Key(2, 1), FIRST, 64)
