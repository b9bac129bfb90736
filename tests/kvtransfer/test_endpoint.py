"""Two real endpoints in one process: what the engine threads see of a transfer."""

import asyncio
from dataclasses import replace

import msgspec
import pytest

from common.config import TimerConfig
from common.messages import Peer, TokenLogprob
from kvtransfer.commands import (
    Abort,
    Arrived,
    Broken,
    Delivered,
    First,
    Key,
    Offer,
    Refuse,
    Returned,
    Revoke,
    Ticketed,
    Wait,
    Wanted,
)
from tests.kvtransfer.node import FIRST, PATIENT, TIMERS, Node, running
from tests.kvtransfer.pool import BLOCK_SIZE, LAYOUT

KEY = Key(7, 1)
pytestmark = pytest.mark.usefixtures("transport")


async def ticket(p: Node, d: Node, key: Key, num_tokens: int, slots: dict[int, int]) -> None:
    """Open a transfer at `p` and grant it at `d`."""
    p.open(key, d.peer, num_tokens)
    wanted = await d.events.next(Wanted)
    assert wanted == Wanted(key, p.peer, num_tokens)
    d.grant(key, slots)
    assert await p.events.next(Ticketed) == Ticketed(key, len(slots))


async def test_ships_all_blocks_with_a_partial_tail() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        contents = [p.pool.fill(10 + i, f"block {i}") for i in range(3)]
        await ticket(p, d, KEY, 40, {0: 5, 1: 3, 2: 9})
        first = (First(0, 1, TokenLogprob(1, -0.5, ((1, -0.5),))), First(1, 2, None))
        p.offer(KEY, [10, 11, 12], fill=8)
        p.finish(KEY, first)
        assert await d.events.next(Arrived) == Arrived(KEY, first, 3 * 64)
        assert await p.events.next(Delivered) == Delivered(KEY, 3, 3 * 64)
        assert [d.pool.read(block) for block in (5, 3, 9)] == contents
        assert d.endpoint.stats().blocks_received == 3
        assert not d.endpoint.stats().dropped and not p.endpoint.stats().dropped
        assert (p.endpoint.stats().sending, d.endpoint.stats().receiving) == (0, 0)


async def test_ships_only_what_the_receiver_lacks() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        contents = [p.pool.fill(i, f"block {i}") for i in range(6)]
        untouched = bytes(d.pool.memory)
        await ticket(p, d, KEY, 96, {4: 0, 5: 1})
        p.offer(KEY, [0, 1, 2, 3, 4, 5])
        p.finish(KEY)
        assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 2 * 64)
        assert await p.events.next(Delivered) == Delivered(KEY, 2, 2 * 64)
        assert d.pool.read(0) == contents[4] and d.pool.read(1) == contents[5]
        assert d.pool.memory[2 * 64 :] == untouched[2 * 64 :]
        assert p.endpoint.stats().blocks_sent == 2


async def test_nothing_is_shipped_when_the_receiver_has_it_all() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        await ticket(p, d, KEY, 32, {})
        p.offer(KEY, [0, 1])
        p.finish(KEY)
        assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 0)
        assert await p.events.next(Delivered) == Delivered(KEY, 0, 0)


async def test_blocks_leave_while_later_ones_are_computed() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        p.open(KEY, d.peer, 64)
        p.offer(KEY, [0, 1])  # before the ticket
        await d.events.next(Wanted)
        d.grant(KEY, {0: 0, 1: 1, 2: 2, 3: 3})
        await p.events.next(Ticketed)
        while d.endpoint.stats().blocks_received < 2:
            await asyncio.sleep(0.001)
        p.offer(KEY, [7], start=2)
        while d.endpoint.stats().blocks_received < 3:
            await asyncio.sleep(0.001)
        assert d.events.empty()
        p.offer(KEY, [4], start=3)
        p.finish(KEY)
        await d.events.next(Arrived)
        await p.events.next(Delivered)


async def test_a_grant_may_come_long_after_a_wait() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        p.open(KEY, d.peer, 16)
        p.offer(KEY, [0])
        p.finish(KEY)
        await d.events.next(Wanted)
        d.endpoint.command(Wait(KEY))
        await asyncio.sleep(1.5 * TIMERS.stall_s)
        assert p.events.empty() and d.events.empty()
        d.grant(KEY, {0: 0})
        await d.events.next(Arrived)
        assert await p.events.next(Ticketed) == Ticketed(KEY, 1)
        await p.events.next(Delivered)


async def test_a_refusal_breaks_the_transfer_and_is_remembered() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        p.open(KEY, d.peer, 16)
        await d.events.next(Wanted)
        d.endpoint.command(Refuse(KEY, "no_blocks"))
        assert await p.events.next(Broken) == Broken(KEY, "refused", "no_blocks")
        p.open(KEY, d.peer, 16)  # the same attempt is over for good
        assert await p.events.next(Broken) == Broken(KEY, "refused", "gone")
        assert d.events.empty()


@pytest.mark.parametrize(("reason", "seen"), [("finished", "finished"), ("cancel", "aborted")])
async def test_abort_by_the_sender(reason: str, seen: str) -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        asked, waiting, granted, landed = (Key(1, i) for i in range(4))
        for key in (asked, waiting, granted, landed):
            p.open(key, d.peer, 32)
            await d.events.next(Wanted)
        d.endpoint.command(Wait(waiting))
        d.grant(granted, {0: 0, 1: 1})
        assert await p.events.next(Ticketed) == Ticketed(granted, 2)
        d.grant(landed, {0: 2, 1: 3})
        assert await p.events.next(Ticketed) == Ticketed(landed, 2)
        p.offer(landed, [0])
        while d.endpoint.stats().blocks_received < 1:
            await asyncio.sleep(0.001)
        for key, positions in ((asked, ()), (waiting, ()), (granted, ()), (landed, (0,))):
            p.endpoint.command(Abort(key, reason))
            assert await d.events.next(Returned) == Returned(key, positions, seen)
        assert p.events.empty() and p.endpoint.stats().sending == 0
        assert d.endpoint.stats().receiving == 0


async def test_abort_before_the_connection_is_there() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        p.open(KEY, d.peer, 32)
        p.endpoint.command(Abort(KEY, "cancel"))
        await ticket(p, d, Key(7, 2), 16, {0: 0})
        assert d.endpoint.stats().receiving == 1


async def test_revoke_by_the_receiver() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        await ticket(p, d, KEY, 32, {0: 0, 1: 1})
        p.offer(KEY, [0])
        while d.endpoint.stats().blocks_received < 1:
            await asyncio.sleep(0.001)
        d.endpoint.command(Revoke(KEY))
        assert await d.events.next(Returned, 0) == Returned(KEY, (0,), "revoked")
        assert await p.events.next(Broken) == Broken(KEY, "refused", "gone")
        before = bytes(d.pool.memory)
        p.endpoint.command(Offer(KEY, ()))  # crosses its Broken: ignored
        await ticket(p, d, Key(8, 1), 16, {0: 9})
        assert bytes(d.pool.memory) == before
        d.endpoint.command(Revoke(KEY))  # its Returned was the answer
        assert d.events.empty()


async def test_many_transfers_share_the_window_in_turns() -> None:
    block_bytes = 1 << 20
    p = Node("p", 1, num_blocks=48, block_bytes=block_bytes, timers=PATIENT)
    d = Node("d", 2, num_blocks=48, block_bytes=block_bytes, timers=PATIENT)
    async with running(p, d):
        keys = [Key(i, 1) for i in range(4)]
        for i, key in enumerate(keys):
            await ticket(p, d, key, 12 * BLOCK_SIZE, {j: 12 * i + j for j in range(12)})
        for block in range(48):
            p.pool.fill(block, f"block {block}")
        for i, key in enumerate(keys):
            p.offer(key, range(12 * i, 12 * i + 12))
            p.finish(key)
        arrived = [(await d.events.next(Arrived)).key for _ in keys]
        assert sorted(arrived) == keys
        for _ in keys:
            await p.events.next(Delivered)
        assert d.pool.memory == p.pool.memory


async def test_scattered_blocks_of_one_message() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        blocks = [9, 10, 3, 40, 41, 42, 1]
        contents = [p.pool.fill(block, f"{block} ") for block in blocks]
        slots = {i: 63 - 5 * i for i in range(7)}
        await ticket(p, d, KEY, 7 * BLOCK_SIZE, slots)
        p.offer(KEY, blocks)
        p.finish(KEY)
        await d.events.next(Arrived)
        assert [d.pool.read(slots[i]) for i in range(7)] == contents


async def test_both_directions_at_once() -> None:
    a, b = Node("a", 1, timers=PATIENT), Node("b", 2, timers=PATIENT)
    async with running(a, b):
        content = a.pool.fill(0, "from a"), b.pool.fill(1, "from b")
        for source, target, key in ((a, b, Key(1, 1)), (b, a, Key(2, 1))):
            await ticket(source, target, key, 16, {0: 20})
        a.offer(Key(1, 1), [0])
        b.offer(Key(2, 1), [1])
        a.finish(Key(1, 1))
        b.finish(Key(2, 1))
        for node in (a, a, b, b):
            await node.events.next(Delivered | Arrived)  # type: ignore[arg-type]
        assert (b.pool.read(20), a.pool.read(20)) == content


async def test_layouts_must_be_equal() -> None:
    p, d = Node("p", 1), Node("d", 2, layout=msgspec.structs.replace(LAYOUT, num_kv_heads=1))
    async with running(p, d):
        p.open(KEY, d.peer, 16)
        broken = await p.events.next(Broken)
        assert broken.reason == "refused"
        assert "num_kv_heads=2" in broken.detail and "num_kv_heads=1" in broken.detail
        # The goodbye of the link may have come too, on a route that was refused.
        assert d.endpoint.stats().dropped["hello_layout"] == 1


async def test_an_address_where_nobody_is() -> None:
    timers = replace(TIMERS, heartbeat_s=0.1, dead_after=2)
    p = Node("p", 1, timers=timers)
    d = Node("d", 2)
    async with running(d):
        gone = d.peer
    async with running(p):
        p.open(KEY, gone, 16)
        p.open(Key(8, 1), Peer("x", 1, "nonsense"), 16)
        assert (await p.events.next(Broken)).key == Key(8, 1)
        broken = await p.events.next(Broken, timeout_s=2)
        assert (broken.key, broken.reason) == (KEY, "peer")


async def test_reset_ends_everything_and_begins_a_new_life() -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        await ticket(p, d, KEY, 32, {0: 0, 1: 1})
        d.endpoint.reset(3)
        assert await d.events.next(Returned, 0) == Returned(KEY, (), "reset")
        broken = await p.events.next(Broken)
        assert (broken.key, broken.reason) == (KEY, "peer")
        old, d.epoch = d.peer, 3
        p.open(Key(7, 2), old, 16)  # by a router that has not heard of it
        assert (await p.events.next(Broken)).reason == "peer"
        await ticket(p, d, Key(7, 3), 16, {0: 0})
        p.endpoint.reset(4)
        assert (await p.events.next(Broken)).reason == "reset"
        assert (await d.events.next(Returned)).reason == "aborted"
        p.epoch = 4
        await ticket(p, d, Key(7, 4), 16, {0: 0})


async def test_a_block_that_never_lands_is_a_stall() -> None:
    """The receiver's loop stands still: its side of the connection stays open."""
    timers = TimerConfig(heartbeat_s=5, lease_s=10, stall_s=0.4)
    p, d = Node("p", 1, timers=timers), Node("d", 2, timers=timers)
    async with running(p, d):
        await ticket(p, d, KEY, 16, {0: 0})
        for task in (*d.endpoint._tasks, *d.endpoint._readers):
            task.cancel()
        p.offer(KEY, [0])
        broken = await p.events.next(Broken, timeout_s=2)
        assert (broken.key, broken.reason) == (KEY, "stalled")


async def test_an_engine_without_steps_is_a_stall() -> None:
    timers = TimerConfig(heartbeat_s=5, lease_s=10, stall_s=0.4)
    p, d = Node("p", 1, timers=timers), Node("d", 2, timers=timers)
    async with running(p, d):
        await ticket(p, d, KEY, 16, {0: 0})
        for step in range(8):
            p.endpoint.set_progress(step)
            await asyncio.sleep(0.1)
        assert d.events.empty()
        assert await d.events.next(Returned, timeout_s=2) == Returned(KEY, (), "stalled")
        assert await p.events.next(Broken) == Broken(KEY, "stalled", "stalled")


async def test_leases_end_when_the_receiver_falls_silent() -> None:
    timers = TimerConfig(heartbeat_s=5, lease_s=0.6, stall_s=5)
    p, d = Node("p", 1, timers=timers), Node("d", 2, timers=timers)
    async with running(p, d):
        await ticket(p, d, KEY, 16, {0: 0})
        for step in range(8):
            p.endpoint.set_progress(step)
            await asyncio.sleep(0.15)
        assert p.events.empty()
        for task in d.endpoint._tasks:
            task.cancel()
        broken = await p.events.next(Broken, timeout_s=2)
        assert (broken.key, broken.reason) == (KEY, "lease")
