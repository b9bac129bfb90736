"""What a data transport does for an endpoint. One implementation: `kvtransfer.zmq_transport`.

A transport moves headers and bytes and judges nothing: the receiver checks every header before a
byte is copied to a slot, and the digests after. Headers of one outlet come in order, with their
bytes, or the connection is lost; whatever is lost is sent again in a later round.
"""

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import DataHeader


class Outlet(Protocol):
    """The sender's end of a data connection to one receiver."""

    def writable(self) -> bool:
        """Whether `send` would take a shipment now."""
        ...

    def send(self, shipment: Shipment) -> None:
        """Take over a shipment; never blocks. Only after `writable` said so."""
        ...

    async def changed(self) -> bool:
        """Wait until the connection came up (True) or was lost (False)."""
        ...

    def close(self) -> None: ...


class Payload(Protocol):
    """A data message that came in and is not copied yet."""

    header: DataHeader
    num_bytes: int

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int]:
        """Copy the blocks to `slabs` (None: skip); returns the digest of each as written."""
        ...


class Inlet(Protocol):
    """The receiver's end of all data connections of one transport."""

    address: str

    async def receive(self) -> Payload:
        """The next data message. Raises ProtocolError for one that is malformed."""
        ...

    def close(self) -> None: ...
