"""Waiting for sockets: nothing that came is missed, and nobody is kept from the loop."""

import asyncio
import time
from collections.abc import Iterator

import pytest
import zmq

from common.bell import Bell

Pair = tuple[zmq.SyncSocket, zmq.SyncSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two sockets that are connected."""
    context = zmq.Context()
    here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    here.bind("inproc://pair")
    there.connect("inproc://pair")
    yield here, there
    for socket in (here, there):
        socket.close(linger=0)
    context.term()


async def test_every_message_rings(pair: Pair) -> None:
    here, there = pair
    bell = Bell([here])
    for number in range(300):
        there.send(b"%d" % number)
        await asyncio.wait_for(bell.wait(), 10)
        while here.poll(0):
            assert here.recv() == b"%d" % number
    bell.close()


async def test_what_comes_before_the_bell_rings_it(pair: Pair) -> None:
    here, there = pair
    there.send(b"early")
    bell = Bell([here])
    await asyncio.wait_for(bell.wait(), 10)
    assert here.recv(zmq.NOBLOCK) == b"early"
    bell.close()


async def test_a_message_that_a_send_noticed_rings(pair: Pair) -> None:
    here, there = pair
    bell = Bell([here])
    for number in range(300):
        there.send(b"%d" % number)
        here.getsockopt(zmq.EVENTS)  # as a send may do: the descriptor is silent from then on
        bell.look(here)
        await asyncio.wait_for(bell.wait(), 10)
        assert here.recv(zmq.NOBLOCK) == b"%d" % number
    bell.close()


async def test_one_that_rings_again_and_again_lets_others_have_their_turn() -> None:
    bell, turns = Bell([]), 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(10):
        bell.ring()
        await bell.wait()
    assert turns >= 10
    task.cancel()
    bell.close()


async def test_the_time_is_over_once() -> None:
    bell = Bell([])
    bell.wake_in(60.0)
    start = time.monotonic()
    bell.wake_in(0.01)  # instead of the one before
    await asyncio.wait_for(bell.wait(), 10)
    assert bell.is_due and time.monotonic() - start < 10
    bell.wake_in(60.0)
    assert not bell.is_due
    bell.close()
