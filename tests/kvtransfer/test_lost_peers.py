"""Peers that are killed, stopped or replaced by another life, as real processes."""

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from common.messages import Peer
from kvtransfer import protocol
from kvtransfer.commands import Broken, Returned, Ticketed, Wanted
from tests.kvtransfer import node
from tests.kvtransfer.node import Node, running
from tests.kvtransfer.peer_process import KEY, TIMERS
from tests.kvtransfer.pool import WIRE

pytestmark = pytest.mark.usefixtures("transport")


@asynccontextmanager
async def peer_process(*arguments: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.kvtransfer.peer_process",
        node.TRANSPORT,
        *arguments,
        stdin=PIPE,
        stdout=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: Process) -> str:
    assert process.stdout is not None
    data = await asyncio.wait_for(process.stdout.readline(), 20)
    return data.decode().strip()


def sender_arguments(target: Peer) -> list[str]:
    return ["sender", "p", "1", target.id, str(target.epoch), target.address]


async def test_a_killed_receiver_is_noticed() -> None:
    p = Node("p", 1, timers=TIMERS)
    async with running(p), peer_process("receiver", "d", "2") as process:
        p.open(KEY, Peer("d", 2, await line(process)), 32)
        await p.events.next(Ticketed)
        process.kill()
        killed_at = time.monotonic()
        broken = await p.events.next(Broken)
        assert (broken.key, broken.reason) == (KEY, "peer")
        assert time.monotonic() - killed_at < 3
        assert p.endpoint.stats().links == 0


async def test_a_killed_sender_is_noticed() -> None:
    d = Node("d", 2, timers=TIMERS)
    async with running(d), peer_process(*sender_arguments(Peer("d", 2, d.endpoint.address))) as p:
        await d.events.next(Wanted, timeout_s=20)
        d.grant(KEY, {0: 8, 1: 4})
        assert await line(p) == "Ticketed"
        while not d.endpoint.stats().blocks_received:
            await asyncio.sleep(0.01)
        p.kill()
        killed_at = time.monotonic()
        assert await d.events.next(Returned) == Returned(KEY, (0,), "peer")
        assert time.monotonic() - killed_at < 3


async def test_a_stopped_sender_that_wakes_up_changes_nothing() -> None:
    d = Node("d", 2, timers=TIMERS)
    async with running(d), peer_process(*sender_arguments(Peer("d", 2, d.endpoint.address))) as p:
        await d.events.next(Wanted, timeout_s=20)
        d.grant(KEY, {0: 8, 1: 4})
        assert await line(p) == "Ticketed"
        while not d.endpoint.stats().blocks_received:
            await asyncio.sleep(0.01)
        p.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        assert p.stdin is not None
        p.stdin.write(b"offer the second block, close\n")
        returned = await d.events.next(Returned)
        assert returned.landed == (0,) and returned.reason in ("peer", "stalled")
        for block in (8, 4):  # another request has the blocks now
            d.pool.fill(block, f"new {block}")
        before = bytes(d.pool.memory)
        await asyncio.sleep(stopped_at + 2 * TIMERS.lease_s - time.monotonic())
        p.send_signal(signal.SIGCONT)
        assert (await line(p)).startswith("Broken")
        assert bytes(d.pool.memory) == before
        assert d.events.empty()
        assert d.endpoint.stats().blocks_received == 1


async def test_a_stopped_receiver_loses_its_lease() -> None:
    p = Node("p", 1, timers=TIMERS)
    async with running(p), peer_process("receiver", "d", "2") as process:
        p.open(KEY, Peer("d", 2, await line(process)), 32)
        await p.events.next(Ticketed)
        process.send_signal(signal.SIGSTOP)
        broken = await p.events.next(Broken, timeout_s=5)
        assert broken.reason in ("peer", "lease")
        process.send_signal(signal.SIGCONT)
        assert await line(process) == "Wanted"
        assert (await line(process)).startswith("Returned")
        assert p.events.empty()


async def test_a_receiver_that_restarts_at_the_same_address_is_a_new_peer() -> None:
    p, d = Node("p", 1, timers=TIMERS), Node("d", 2, timers=TIMERS)
    context = zmq.asyncio.Context()
    async with running(p):
        async with running(d):
            p.open(KEY, d.peer, 32)
            await d.events.next(Wanted)
            d.grant(KEY, {0: 0, 1: 1})
            await p.events.next(Ticketed)
        reborn = context.socket(zmq.ROUTER)
        try:
            reborn.bind(d.endpoint.address)
            route, hello = await reborn.recv_multipart()
            assert isinstance(protocol.decode_for_receiver(hello), protocol.Hello)
            welcome = protocol.Welcome(id="d", epoch=3, window=1, wire=WIRE, data={})
            await reborn.send_multipart([route, protocol.encode(welcome)])
            assert await p.events.next(Broken) == Broken(KEY, "peer", "d@3 answers for d@2")
        finally:
            reborn.close(linger=0)
            context.term()
