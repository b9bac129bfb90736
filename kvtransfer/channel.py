"""The sockets from an endpoint to one receiver. Used by `Endpoint` alone."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import zmq
import zmq.asyncio

from common.curve import Caller
from kvtransfer.sockets import ControlSocket, LinkMonitor, prepare_dealer
from kvtransfer.transport import Outlet


class Channel:
    """A control DEALER and, once the receiver has said where, an outlet for data.

    `outlet` is None while there is no data connection."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        options: Mapping[int, int],
        caller: Caller,
    ) -> None:
        """Raises zmq.ZMQError for an address that is none, or where no more sockets can be had;
        the loop then watches nothing of it."""
        self.caller = caller
        self.outlet: Outlet | None = None
        self.connected_at = 0.0
        """When `outlet` was connected."""
        self.patience: asyncio.Timeout | None = None
        """With `outlet`; when it is over there is to be another one."""
        self.has_carrier = False
        """A loop of the endpoint keeps `outlet` connected."""
        self.tasks: list[asyncio.Task[None]] = []
        """Loops of the endpoint that read these sockets; they end with the channel."""
        self.control = ControlSocket(context, zmq.DEALER)
        try:
            prepare_dealer(self.control.plain)
            for option, value in options.items():
                self.control.plain.setsockopt(option, value)
            caller.prepare(self.control.plain)
            self.monitor = LinkMonitor(context, self.control.plain)
            try:
                self.control.plain.connect(address)
            except BaseException:
                self.monitor.close()
                raise
        except BaseException:
            self.control.close(linger=0)
            raise

    async def close(self) -> None:
        await cancel(self.tasks)
        self.monitor.close()
        # The last message, an abort perhaps, gets a moment to leave.
        self.control.close(linger=100)
        if self.outlet is not None:
            self.outlet.close()


async def cancel(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """End loops. What one of them failed with is reported by `Endpoint.failed`."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
