"""What a data transport does for an endpoint; implemented in `kvtransfer.*_transport`.

A transport moves headers and bytes and judges nothing: the receiver checks every header before a
byte is written to a slot, and the digests after. Headers of one outlet come in order, with their
bytes, or the connection is lost; whatever is lost is sent again in a later round.

Neither side touches a block for longer than it may: what is under way can be abandoned at any
moment, and from then on the pool is not read or written, whatever the other side does.
"""

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.outgoing import Shipment
from kvtransfer.protocol import DataHeader


class Outlet(Protocol):
    """The sender's end of a data connection to one receiver. It is connected when it is made
    and does not come back when it is lost."""

    transport: str
    in_place: bool
    """The receiver reads the blocks out of the pool itself, and cuts them if need be."""

    @property
    def reading(self) -> int | None:
        """The transfer whose blocks are still being read from the pool."""
        ...

    def writable(self) -> bool:
        """Whether `send` would take a shipment now."""
        ...

    def send(self, shipment: Shipment) -> None:
        """Take over a shipment; never blocks. Only after `writable` said so."""
        ...

    def abandon(self) -> None:
        """Do not read the blocks of the shipment under way any more."""
        ...

    async def changed(self) -> bool:
        """Wait until an outlet that was not writable may be so again (True) or was lost (False).
        After a `send` that leaves it writable it need not say anything."""
        ...

    def close(self) -> None: ...


class Payload(Protocol):
    """A data message that came in and is not copied yet."""

    header: DataHeader
    num_bytes: int

    async def copy(self, slabs: Sequence[memoryview | None]) -> list[int | None]:
        """Write the blocks to `slabs` (None: skip that block), once. Every payload is copied or
        skipped before the next one is received.

        Returns the digest of each slab as written, None for one that was skipped or whose bytes
        were not the sender's any more. Raises ConnectionError if the rest does not come.
        """
        ...

    def abandon(self) -> None:
        """Write nothing to the slabs from now on; `copy` goes on without them."""
        ...


class Stream(Protocol):
    """The receiver's end of one data connection."""

    transport: str

    async def receive(self) -> Payload:
        """The next data message. Raises ProtocolError for one that is malformed, and
        ConnectionError when no further one can come."""
        ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Where the senders' outlets of one transport connect to."""

    address: str

    async def accept(self) -> Stream: ...

    def close(self) -> None: ...
