"""The listening socket: its errors are one line, its connections send each chunk at once."""

import asyncio
import socket
from typing import cast

import pytest
import uvloop

from common.errors import ConfigError
from router.server import listen


class Greeter(asyncio.Protocol):
    """Answers whether Nagle's algorithm is off on its connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Transports of uvloop are no subclasses of asyncio's.
        writer = cast(asyncio.WriteTransport, transport)
        connection = writer.get_extra_info("socket")
        is_set = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        writer.write(b"1" if is_set else b"0")


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_connections_do_not_delay_small_writes(host: str, loop_factory: object) -> None:
    async def greeting(listener: socket.socket) -> bytes:
        server = await asyncio.get_running_loop().create_server(Greeter, sock=listener)
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        answer = await reader.readexactly(1)
        writer.close()
        await writer.wait_closed()
        server.close()
        return answer

    assert callable(loop_factory)
    with listen(host, 0) as listener, asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(greeting(listener)) == b"1"


def test_errors_are_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1 is in use"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on port 0 of 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="--host not an address is no address"):
        listen("not an address", 0)
