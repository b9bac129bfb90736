"""What `ucx_transport` and its helper process (`ucx_process`) say to each other, and to the helpers
of other workers.

The two of one worker talk msgpack over a socket pair, one message per packet. Connections have a
number: even where this worker connected, odd where another one did.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from common.errors import ProtocolError

MAX_PACKET_BYTES: Final = 160 << 10
"""More than a shipment of RUN_BLOCKS blocks takes, less than a socket buffer of the kernel."""
NUM_ROOMS: Final = 16
"""Messages of a receiver that may have arrived and are not copied yet."""
ALIVE_S: Final = 1.0
"""The helper says something at least this often."""


class Settings(msgspec.Struct, frozen=True):
    """How a helper is started; the JSON of its argument."""

    link_fd: int
    """Its end of the socket pair."""
    pool_fd: int
    pool_bytes: int
    """Memory of the blocks to be sent, which the helper maps read-only."""
    rooms_fd: int
    room_bytes: int
    """Memory for what comes in, NUM_ROOMS times `room_bytes`."""
    is_local: bool
    """Only processes of this machine may connect."""


# ------------------------------------------------------------ worker -> helper


class Connect(msgspec.Struct, frozen=True, array_like=True, tag="connect"):
    number: int
    address: str


class Ship(msgspec.Struct, frozen=True, array_like=True, tag="ship"):
    """Answered by Shipped."""

    number: int
    header: bytes
    runs: tuple[tuple[int, int], ...]
    """(offset, bytes) in the pool."""
    staged: int = 0
    """Bytes that are not in the pool: the descriptor of their memory comes with the packet."""


class Free(msgspec.Struct, frozen=True, array_like=True, tag="free"):
    """What was in this room is not needed any more."""

    room: int


class HangUp(msgspec.Struct, frozen=True, array_like=True, tag="hang_up"):
    number: int


# ------------------------------------------------------------ helper -> worker


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The first message: where other helpers connect to."""

    address: str


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """Nothing has happened for a while."""


class Connected(msgspec.Struct, frozen=True, array_like=True, tag="connected"):
    """The connection is up: Connect is answered, or another worker connected (odd number)."""

    number: int
    way: str
    """`sm` (memory of this machine) or `net`."""


class Lost(msgspec.Struct, frozen=True, array_like=True, tag="lost"):
    """The connection is over, or could not be made."""

    number: int
    reason: str


class Shipped(msgspec.Struct, frozen=True, array_like=True, tag="shipped"):
    number: int


class Came(msgspec.Struct, frozen=True, array_like=True, tag="came"):
    """A data message is there; its room is held until Free."""

    number: int
    header: bytes
    room: int
    num_bytes: int


ToHelper = Connect | Ship | Free | HangUp
FromHelper = Ready | Alive | Connected | Lost | Shipped | Came

decode_for_helper: Final = msgspec.msgpack.Decoder(ToHelper)
decode_from_helper: Final = msgspec.msgpack.Decoder(FromHelper)
encode: Final = msgspec.msgpack.encode

# ------------------------------------------------------------ helper <-> helper


class Door(NamedTuple):
    """One way into a helper: the address of a UCX worker, and the tag for a Hello."""

    way: str
    """`net`, or `sm/` and what tells one machine (and one set of process ids) from others."""
    worker: bytes
    bulk: bytes
    """The UCX worker that takes bodies; empty: the same."""
    tag: int


class Hello(NamedTuple):
    """First message of who connects: how to answer."""

    worker: bytes
    tag: int
    pid: int


class Answer(NamedTuple):
    """The tag for data, and whose it is."""

    tag: int
    pid: int


class Envelope(NamedTuple):
    """Goes before the bytes, which come as one message of each length with the tag `tag`."""

    header: bytes
    tag: int
    lengths: tuple[int, ...]


decode_doors: Final = msgspec.msgpack.Decoder(list[Door])
decode_hello: Final = msgspec.msgpack.Decoder(Hello)
decode_answer: Final = msgspec.msgpack.Decoder(Answer)
decode_envelope: Final = msgspec.msgpack.Decoder(Envelope)

_SCHEME: Final = "ucx:"


def address_of(doors: Sequence[Door]) -> str:
    """What senders are told; the best way first."""
    return _SCHEME + base64.urlsafe_b64encode(encode(doors)).decode()


def doors_of(address: str) -> list[Door]:
    """Raises ProtocolError if that is no address."""
    try:
        return decode_doors.decode(base64.urlsafe_b64decode(address.removeprefix(_SCHEME)))
    except (msgspec.DecodeError, binascii.Error, ValueError) as error:
        raise ProtocolError(f"{address!r} is no address of a UCX helper") from error


def has_rdma() -> bool:
    """Whether this machine has a device for which UCX is the best way."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())
