"""The sender alone, message by message, with a hand-turned clock."""

from random import Random

from common.config import TimerConfig
from common.messages import Peer
from kvtransfer import protocol as p
from kvtransfer.commands import Abort, BlockRef, Broken, Close, Key, Offer, Open, Slot, Ticketed
from kvtransfer.sender import Sender
from kvtransfer.stats import TransferStats
from kvtransfer.timers import Timers
from tests.kvtransfer.node import FIRST
from tests.kvtransfer.pool import BLOCK_SIZE, WIRE, BytePool, identity

PEER = Peer("d", 2, "address")
BLOCK_BYTES = 1 << 20
WINDOW = 8 * BLOCK_BYTES
TIMERS = Timers.of(TimerConfig())


def make(num_blocks: int = 64) -> Sender:
    """A sender without links."""
    pool = BytePool(num_blocks, BLOCK_BYTES)
    return Sender(identity("p", 1), pool, TIMERS, TransferStats(), Random(0))


def sent(sender: Sender) -> list[p.ToReceiver]:
    messages = [message for _, message in sender.outbox]
    sender.outbox.clear()
    return messages


def begin(sender: Sender, key: Key, num_blocks: int) -> int:
    """Open a transfer, on a link with a window of 8 blocks; returns its id."""
    sender.command(Open(key, PEER, num_blocks * BLOCK_SIZE), 0.0)
    if not sender.links[PEER].up:
        sender.connected(PEER, 0.0)
        sender.message(PEER, p.Welcome(id="d", epoch=2, window=WINDOW, wire=WIRE, data={}), 0.0)
    message = sent(sender)[-1]
    assert isinstance(message, p.Begin) and message.key == key and message.round == 0
    return message.transfer


def ticket(transfer: int, positions: range, round: int = 1, renewal: int = 0) -> p.Ticket:
    slots = tuple(Slot(i, 100 + i, 1) for i in positions)
    return p.Ticket(transfer, round, bytes(16), renewal, slots)


def offer(key: Key, blocks: range) -> Offer:
    refs = [BlockRef(i, block, BLOCK_SIZE) for i, block in enumerate(blocks)]
    return Offer(key, tuple(refs))


def positions(sender: Sender, now: float = 0.0) -> list[tuple[int, list[int]]]:
    """What is shipped now: (transfer, positions) of each data message."""
    shipped = []
    while (shipment := sender.next_shipment(PEER, now)) is not None:
        header = shipment.header
        shipped.append((header.transfer, [block.position for block in header.blocks]))
    return shipped


def test_the_window_is_shared_in_turns() -> None:
    sender = make()
    a, b = begin(sender, Key(1, 1), 8), begin(sender, Key(2, 1), 8)
    for transfer, key, blocks in ((a, Key(1, 1), range(8)), (b, Key(2, 1), range(8, 16))):
        sender.message(PEER, ticket(transfer, range(8)), 0.0)
        sender.command(offer(key, blocks), 0.0)
    assert positions(sender) == [(a, [0, 1, 2, 3]), (b, [0, 1, 2, 3])]
    sender.message(PEER, p.Landed(b, (0, 1)), 0.0)
    assert positions(sender) == [(a, [4, 5])]
    sender.message(PEER, p.Landed(a, (0, 1, 2, 3, 4, 5)), 0.0)
    assert positions(sender) == [(b, [4, 5, 6, 7]), (a, [6, 7])]


def test_runs_are_blocks_that_are_neighbours_in_the_pool() -> None:
    sender = make()
    transfer = begin(sender, Key(1, 1), 4)
    sender.message(PEER, ticket(transfer, range(4)), 0.0)
    refs = [BlockRef(i, block, BLOCK_SIZE) for i, block in enumerate((7, 8, 3, 4))]
    sender.command(Offer(Key(1, 1), tuple(refs)), 0.0)
    shipment = sender.next_shipment(PEER, 0.0)
    assert shipment is not None and shipment.runs == ((7, 2), (3, 2))


def test_begin_and_close_are_repeated_until_answered() -> None:
    sender = make()
    transfer = begin(sender, Key(1, 1), 1)
    sender.tick(0.4)
    assert sent(sender) == []
    sender.tick(0.5)
    assert [type(message) for message in sent(sender)] == [p.Begin]
    sender.message(PEER, ticket(transfer, range(1)), 0.6)
    assert sender.events.popleft() == Ticketed(Key(1, 1), 1)
    sender.message(PEER, ticket(transfer, range(1)), 0.7)  # repeated: nothing new
    sender.command(offer(Key(1, 1), range(1)), 0.7)
    sender.command(Close(Key(1, 1), FIRST), 0.7)
    assert sent(sender) == [] and not sender.events
    shipment = sender.next_shipment(PEER, 0.8)
    assert shipment is not None and shipment.header.end == p.End.of(FIRST)  # the block says it
    assert positions(sender, 0.8) == [] and sent(sender) == []
    close = p.Close(transfer, 1, 1, FIRST)
    sender.tick(1.2)
    assert sent(sender) == [p.Progress(0, 0.0)] and positions(sender, 1.2) == []
    sender.tick(1.3)
    assert sent(sender) == [close]
    assert positions(sender, 1.3) == [(transfer, [])]


def test_a_later_round_sends_what_is_missing_again() -> None:
    sender = make()
    transfer = begin(sender, Key(1, 1), 3)
    sender.message(PEER, ticket(transfer, range(3)), 0.0)
    sender.command(offer(Key(1, 1), range(3)), 0.0)
    assert positions(sender) == [(transfer, [0, 1, 2])]
    sender.message(PEER, ticket(transfer, range(1, 2), round=2), 0.0)
    assert positions(sender) == [(transfer, [1])]
    sender.message(PEER, ticket(transfer, range(3), round=1), 0.0)  # late
    assert positions(sender) == []


def test_a_ticket_for_positions_that_are_not_there() -> None:
    sender = make()
    transfer = begin(sender, Key(1, 1), 2)
    sender.message(PEER, ticket(transfer, range(1, 3)), 0.0)
    twice = p.Ticket(transfer, 1, bytes(16), 0, (Slot(0, 1, 1), Slot(0, 2, 1)))
    sender.message(PEER, twice, 0.0)
    assert not sender.events and sender._stats.dropped == {"ticket": 2}


def test_what_a_renewal_does_not_name_has_ended() -> None:
    sender = make()
    transfer, other = begin(sender, Key(1, 1), 1), begin(sender, Key(2, 1), 1)
    sender.message(PEER, ticket(transfer, range(1), renewal=3), 0.0)
    sender.message(PEER, ticket(other, range(1), renewal=3), 0.0)
    sender.events.clear()
    sender.message(PEER, p.Renew(3, (), WINDOW), 0.0)  # sent before the tickets, read after them
    assert not sender.events
    sender.message(PEER, p.Renew(4, (other,), WINDOW), 0.0)
    assert [event.key for event in sender.events if isinstance(event, Broken)] == [Key(1, 1)]
    assert sent(sender) == [p.AbortTransfer(transfer, "lease")]


def test_leases_last_as_long_as_they_are_renewed() -> None:
    sender = make()
    transfer = begin(sender, Key(1, 1), 1)
    sender.message(PEER, ticket(transfer, range(1)), 0.0)
    sender.events.clear()
    for second in range(1, 20):
        sender.tick(float(second))
        sender.message(PEER, p.Renew(second, (transfer,), WINDOW), float(second))
    sender.tick(19.0 + TIMERS.lease_s)
    assert not sender.events
    sender.tick(19.1 + TIMERS.lease_s)
    assert sender.events.popleft() == Broken(Key(1, 1), "lease", "the lease was not renewed")


def test_the_receiver_of_a_forgotten_transfer_is_told() -> None:
    sender = make()
    transfer = begin(sender, Key(1, 1), 1)
    sender.command(Abort(Key(1, 1), "finished"), 0.0)
    told = p.AbortTransfer(transfer, "finished")
    assert sent(sender) == [told]
    sender.message(PEER, ticket(transfer, range(1)), 0.1)  # the abort was lost
    sender.message(PEER, p.Renew(1, (transfer, 12345), WINDOW), 0.2)
    assert sorted(map(repr, sent(sender))) == sorted(
        map(repr, [told, told, p.AbortTransfer(12345, "gone")])
    )


def test_slow_is_no_stall() -> None:
    """One block every four seconds, over two transfers: the path is alive."""
    sender = make()
    keys = [Key(1, 1), Key(2, 1)]
    ids = [begin(sender, key, 4) for key in keys]
    for i, key in enumerate(keys):
        sender.message(PEER, ticket(ids[i], range(4)), 0.0)
        sender.command(offer(key, range(4 * i, 4 * i + 4)), 0.0)
    positions(sender)
    sender.events.clear()
    now = 0.0
    for i in range(8):
        now += 4.0
        sender.message(PEER, p.Renew(i + 1, tuple(ids), WINDOW), now)
        sender.tick(now)
        sender.message(PEER, p.Landed(ids[i % 2], (i // 2,)), now)
    assert not sender.events
    sender.command(offer(keys[0], range(0)), now)
    sender.tick(now + TIMERS.stall_s + 0.1)
    assert not sender.events  # nothing is under way


def test_an_idle_link_is_closed() -> None:
    sender = make()
    begin(sender, Key(1, 1), 1)
    sender.command(Abort(Key(1, 1), "cancel"), 0.0)
    sender.tick(TIMERS.idle_s)
    assert PEER in sender.links
    sender.tick(TIMERS.idle_s + 0.1)
    assert not sender.links and not sender.events


def test_the_time_that_computing_did_not_hide() -> None:
    stats = TransferStats()
    sender = Sender(identity("p", 1), BytePool(4, BLOCK_BYTES), TIMERS, stats, Random(0))
    transfer = begin(sender, Key(1, 1), 2)
    sender.message(PEER, ticket(transfer, range(2)), 0.1)
    sender.command(offer(Key(1, 1), range(2)), 0.2)
    assert positions(sender, 0.2) == [(transfer, [0, 1])]
    sender.message(PEER, p.Landed(transfer, (0, 1)), 0.5)
    assert stats.exposed_s == 0.0
    sender.command(Close(Key(1, 1), FIRST), 1.0)
    sender.message(PEER, p.Ack(transfer), 1.25)
    assert stats.exposed_s == 0.25
