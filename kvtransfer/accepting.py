"""Accepting connections in an asyncio loop such that none is lost when the loop ends.

Used by the `shm` and `tcp` transports. `asyncio.Server` and `loop.sock_accept` of Python 3.11 may
accept a connection and hand it to nobody when they are closed or cancelled at that moment.
"""

import asyncio
import errno
import logging
import socket
from typing import Final

log = logging.getLogger("tandem.transfer")

EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of `accept` that pass when others close their files."""
RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 30.0
"""Between attempts of what fails again and again."""


def longer(pause_s: float) -> float:
    """The pause before the next attempt, after one that came after `pause_s`."""
    return min(max(RETRY_S, 2 * pause_s), MAX_RETRY_S)


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection of a non-blocking listener, non-blocking itself.

    Nothing is awaited between the accept and the return. Raises OSError if the listener cannot be
    used any more.
    """
    while True:
        await readable(listener)
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            continue
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            log.error("cannot accept a data connection: %s", error)
            await asyncio.sleep(RETRY_S)
            continue
        connection.setblocking(False)
        return connection


async def readable(connection: socket.socket) -> None:
    """Wait until `connection` can be read or accepted from, or was closed by its peer."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
