"""Which transports an endpoint offers, and which one a pair uses. Used by `Endpoint`.

The receiver says at Welcome where each transport can be reached; the sender takes the first of
ORDER that both offer and that it can really connect to.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import zmq.asyncio

from common.curve import Caller, CurveKeys
from common.errors import ConfigError
from common.messages import KvLayoutInfo
from kvtransfer.memory import BlockMemory
from kvtransfer.shm_transport import ShmListener, ShmOutlet
from kvtransfer.tcp_stream import TcpListener
from kvtransfer.tcp_transport import TcpOutlet
from kvtransfer.transport import Listener, Outlet
from kvtransfer.ucx_messages import has_rdma
from kvtransfer.ucx_transport import MISSING, UcxListener, is_installed
from kvtransfer.zmq_transport import ZmqListener, ZmqOutlet

ORDER: Final = ("shm", "tcp", "zmq")
"""From the fastest to the one that works everywhere. `auto` has `ucx` after `shm` where there is a
device for RDMA; without one `tcp` was measured to be faster."""


def offered(transport: str, memory: BlockMemory) -> tuple[str, ...]:
    """The transports of an endpoint that is configured for `transport` (`auto`: all that it can
    use). Raises ConfigError for one that cannot be used here."""
    usable = ORDER if memory.shared is not None else ORDER[1:]
    if transport == "ucx" and not is_installed():
        raise ConfigError(MISSING)
    if memory.shared is not None and is_installed() and (transport == "ucx" or has_rdma()):
        usable = (usable[0], "ucx", *usable[1:])
    if transport == "auto":
        return usable
    if transport not in usable:
        raise ConfigError(f"--transport {transport} cannot be used here, but {', '.join(usable)}")
    return (transport,)


async def listen(
    name: str,
    context: zmq.asyncio.Context,
    address: str,
    memory: BlockMemory,
    keys: CurveKeys | None,
    layout: KvLayoutInfo,
) -> Listener:
    """Let data come in over this transport. `address`: what zmq binds, a host for the others;
    `layout`: of the blocks of `memory`.
    Raises OSError or zmq.ZMQError if that cannot be, ConfigError if this transport is of no use
    here."""
    if name == "shm":
        return ShmListener(memory.block_bytes, layout)
    if name == "tcp":
        return await TcpListener.listen(address, memory.block_bytes)
    if name == "ucx":
        try:
            return await UcxListener.listen(address, memory)
        except OSError as error:
            raise ConfigError(str(error)) from error
    return ZmqListener(context, address, memory, keys)


async def connect(
    names: Sequence[str],
    addresses: Mapping[str, str],
    context: zmq.asyncio.Context,
    memory: BlockMemory,
    block_size: int,
    timeout_s: float,
    caller: Caller,
    listeners: Mapping[str, Listener],
) -> tuple[Outlet | None, str]:
    """A connection over the first of `names` that answers within `timeout_s`, None if none does,
    and why those before it were not taken. `block_size`: tokens of a block of `memory`;
    `listeners`: of this endpoint, by transport."""
    failures: list[str] = []
    for name in names:
        try:
            async with asyncio.timeout(timeout_s):
                address = addresses[name]
                outlet = await _connect(
                    name, address, context, memory, block_size, caller, listeners
                )
                return outlet, "; ".join(failures)
        except TimeoutError:
            failures.append(f"{name}: no answer from {addresses[name]}")
        except OSError as error:
            failures.append(f"{name}: {error}")
    return None, "; ".join(failures)


async def _connect(
    name: str,
    address: str,
    context: zmq.asyncio.Context,
    memory: BlockMemory,
    block_size: int,
    caller: Caller,
    listeners: Mapping[str, Listener],
) -> Outlet:
    """Raises OSError."""
    if name == "shm":
        return await ShmOutlet.connect(address, memory, block_size)
    if name == "tcp":
        return await TcpOutlet.connect(address, memory)
    if name == "ucx":
        listener = listeners.get(name)
        if not isinstance(listener, UcxListener):
            raise OSError("the UCX helper is being started again")
        return await listener.connect(address, memory)
    return await ZmqOutlet.connect(context, address, memory, caller)
