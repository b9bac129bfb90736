"""The receiver as a state machine, driven by hand with a fake clock."""

from random import Random

from common.config import TimerConfig
from kvtransfer import protocol as p
from kvtransfer.commands import Grant, Key, Slot
from kvtransfer.receiver import Receiver
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from tests.kvtransfer.pool import BLOCK_SIZE, WIRE, identity

TIMERS = Timers.of(TimerConfig())


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
