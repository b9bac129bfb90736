"""An endpoint that is closed while its engine still sends commands."""

import asyncio
import os
import threading

import pytest

from common.messages import Peer
from kvtransfer.commands import Key, Wanted
from tests.kvtransfer.node import Node

CLOSE_S = 10.0
pytestmark = pytest.mark.usefixtures("transport")


async def close_under_commands() -> None:
    """A live link, and more of them with every turn of the loop while the endpoint closes."""
    loop = asyncio.get_running_loop()
    p, d = Node("p", 1), Node("d", 2)
    await p.endpoint.start()
    await d.endpoint.start()
    p.open(Key(1, 1), d.peer, 16)
    await d.events.next(Wanted)
    turns, is_closed = 0, False

    def command() -> None:
        nonlocal turns
        if not is_closed:
            turns += 1
            p.open(Key(1 + turns, 1), Peer(f"d{turns % 3}", 2, d.endpoint.address), 16)
            loop.call_soon(command)

    loop.call_soon(command)
    await p.endpoint.close()
    is_closed = True
    assert turns > 2
    p.open(Key(1, 2), d.peer, 16)  # comes even later
    assert p.endpoint.stats().links == 0
    await d.endpoint.close()


def holdings() -> int:
    """Open sockets, and what wakes up loops. Pools, which are memory files, go with their nodes."""
    with os.scandir("/proc/self/fd") as entries:
        links = [entry.path for entry in entries]
    kinds = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(kind.startswith(("socket:", "anon_inode:", "pipe:")) for kind in kinds)


def test_commands_while_it_closes() -> None:
    """Closing ends, and no socket is left. In a thread: what hangs would be Context.term()."""
    before = holdings()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(close_under_commands())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CLOSE_S)
    assert not thread.is_alive(), f"close() did not return within {CLOSE_S} s"
    assert not errors, errors
    assert holdings() == before
