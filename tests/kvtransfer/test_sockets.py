"""Sockets that cannot be had, and sockets that are closed: what is left of them."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest
import zmq
import zmq.asyncio

from common.curve import Caller
from kvtransfer.channel import Channel
from kvtransfer.zmq_transport import ZmqOutlet
from tests.kvtransfer.pool import BytePool

NOBODY = "tcp://127.0.0.1:1"
CALLER = Caller(None, "")


def number(fd: Any) -> int:
    return fd if isinstance(fd, int) else int(fd.fileno())


def readers(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Descriptors that the running loop watches from now on."""
    loop = asyncio.get_running_loop()
    watched: set[int] = set()
    add, remove = loop.add_reader, loop.remove_reader

    def add_reader(fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        watched.add(number(fd))
        add(fd, callback, *args)

    def remove_reader(fd: Any) -> bool:
        watched.discard(number(fd))
        return remove(fd)

    monkeypatch.setattr(loop, "add_reader", add_reader)
    monkeypatch.setattr(loop, "remove_reader", remove_reader)
    return watched


@pytest.mark.parametrize(
    ("most", "address", "error"),
    [(1, NOBODY, errno.EMFILE), (2, NOBODY, errno.EMFILE), (3, "nonsense", errno.EINVAL)],
)
async def test_a_channel_that_cannot_be_made(
    most: int, address: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop would take the next socket of the same number for one that it watches already, and
    never read it."""
    watched = readers(monkeypatch)
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, most)
    with pytest.raises(zmq.ZMQError) as found:
        Channel(context, address, {}, CALLER)
    assert found.value.errno == error
    assert not watched
    context.term()


@pytest.mark.parametrize("most", [1, 2])
async def test_an_outlet_that_cannot_be_made(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError as of any other transport: the next one is tried."""
    watched = readers(monkeypatch)
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, most)
    with pytest.raises(OSError, match="Too many open files"):
        await ZmqOutlet.connect(context, NOBODY, BytePool(1), CALLER)
    assert not watched
    context.term()


async def test_every_handle_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """libzmq looks into the memory of a handle that is closed again."""
    closed: list[int] = []
    close = zmq.Socket.close

    def count(self: Any, linger: int | None = None) -> None:
        closed.append(self.underlying)
        close(self, linger)

    context = zmq.asyncio.Context()
    channel = Channel(context, NOBODY, {}, CALLER)
    with monkeypatch.context() as patch:
        patch.setattr(zmq.Socket, "close", count)
        await channel.close()
    assert len(closed) == len(set(closed)) == 2
    context.term()
