"""What two transfer endpoints say to each other: control messages and the header of data.

Control messages are tagged msgpack structs on one connection per pair and direction of transfer,
opened by the sender. Data travels on a connection of its own: a `DataHeader`, then raw bytes. Any
message may be lost, late, doubled or forged; nothing here trusts the other side.

Sender to receiver: Hello, Begin, Progress, Close, AbortTransfer. Receiver to sender: Welcome or
Refused, Waiting, Ticket, Nack, Landed, Ack, Renew. A transfer of one data message takes Begin,
Ticket and Ack alone: its header says what Close would, and Ack what Landed would. Whoever wants a
prefix that another worker caches says Fetch on a connection of its own, as if it were to send; the
owner then begins a transfer of that key, or answers Declined.
"""

from typing import Final, NamedTuple, TypeVar

import msgspec
import xxhash

from common.errors import ProtocolError
from common.messages import KvLayoutInfo, Peer
from kvtransfer.commands import First, Key, Slot

VERSION: Final = 3
SECRET_BYTES: Final = 16
RUN_BYTES: Final = 4 << 20
"""Payload of one data message at most (one block, if a block is larger)."""
RUN_BLOCKS: Final = 1024
"""Blocks of one data message at most: it bounds the header."""
WINDOW_BYTES: Final = 32 << 20
"""What one sender may have under way to one receiver at most."""
WORKER_WINDOW_BYTES: Final = 256 << 20
"""What all senders together may have under way to one receiver."""


class Wire(msgspec.Struct, frozen=True, array_like=True):
    """What the blocks of a transfer look like under way: those of the receiver, which are cut to
    that shape out of the sender's. Now only the block sizes may differ; heads and dtype are named,
    so that a part of the heads, or a narrower dtype, can be told from the whole."""

    block_size: int
    first_head: int
    num_heads: int
    dtype: str

    @staticmethod
    def of(layout: KvLayoutInfo) -> "Wire":
        """Whole blocks of this layout."""
        return Wire(layout.block_size, layout.first_kv_head, layout.num_kv_heads, layout.dtype)


# ---------------------------------------------------------------- sender -> receiver


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of every connection; repeated until Welcome or Refused."""

    version: int
    source: Peer
    content_id: str
    layout: KvLayoutInfo
    transports: tuple[str, ...]
    """Names of the transports over which this sender can send data."""


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Asks for a ticket of a later round than `round` (0: none is held)."""

    key: Key
    transfer: int
    source_epoch: int
    destination_epoch: int
    num_tokens: int
    round: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Sent every second: engine steps so far, and how long the longest is predicted to take."""

    steps: int
    step_s: float


class Close(msgspec.Struct, frozen=True, tag="close"):
    """All blocks of this round were sent. Repeated until Ack, Nack or a Ticket. Not said at once
    where the header of the last blocks says it."""

    transfer: int
    round: int
    count: int
    """Blocks that were sent in this round."""
    first: tuple[First, ...]


class AbortTransfer(msgspec.Struct, frozen=True, tag="abort"):
    transfer: int
    reason: str


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Send me the longest prefix of this chain that you hold. Repeated until the owner's Begin or
    Declined."""

    key: Key
    hashes: bytes
    """16 bytes for each unit of 16 tokens, from the first on."""


# ---------------------------------------------------------------- receiver -> sender


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """Answers a Hello; comes again when the data addresses have changed."""

    id: str
    epoch: int
    window: int
    """Bytes that may be under way to this receiver."""
    wire: Wire
    """The shape in which it takes blocks: positions, slots and fills are counted in these."""
    data: dict[str, str]
    """Transport name to the address of its data connection, for those that both sides offer."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """No transfers on this connection: `version`, `content`, `layout`, `transport`; `unknown`: the
    receiver missed the Hello, say it again."""

    reason: str
    detail: str


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """The receiver is alive and has no ticket yet: said where a Begin has no other answer soon."""

    transfer: int


class Ticket(msgspec.Struct, frozen=True, tag="ticket"):
    """Send these blocks to these slots. The same round repeats, a higher one supersedes."""

    transfer: int
    round: int
    secret: bytes
    renewal: int
    """Number of the last Renew that was sent before this ticket."""
    slots: tuple[Slot, ...]


class Nack(msgspec.Struct, frozen=True, tag="nack"):
    """The transfer is over at the receiver: `gone`, `no_blocks`, `draining`, `epoch`, `stalled`,
    `incomplete`."""

    transfer: int
    reason: str


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """These positions were verified; their bytes may be spent on others."""

    transfer: int
    positions: tuple[int, ...]


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """Everything landed and the receiver took over."""

    transfer: int


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """The leases of these transfers go on; those ticketed before and not named have ended."""

    number: int
    transfers: tuple[int, ...]
    window: int
    """See Welcome; it shrinks as more senders come."""


class Declined(msgspec.Struct, frozen=True, tag="declined"):
    """Answer to a Fetch that nothing will be sent for: `gone`, `busy`, `draining`."""

    key: Key
    reason: str


ToReceiver = Hello | Begin | Progress | Close | AbortTransfer | Fetch
ToSender = Welcome | Refused | Waiting | Ticket | Nack | Landed | Ack | Renew | Declined


# ---------------------------------------------------------------- data


class DataBlock(NamedTuple):
    """One block of a data message, in the order of its bytes."""

    position: int
    slot: int
    generation: int
    fill: int
    digest: int
    """xxh3_64 of the whole slab as the receiver has it."""


class End(msgspec.Struct, frozen=True, array_like=True):
    """The first tokens, as Close has them. Unlike what else a header says they are believed, so
    they have a digest, as blocks do."""

    first: bytes
    digest: int

    @staticmethod
    def of(first: tuple[First, ...]) -> "End":
        data = _encoder.encode(first)
        return End(data, xxhash.xxh3_64_intdigest(data))

    def read(self) -> tuple[First, ...] | None:
        """None if they were damaged on the way."""
        if xxhash.xxh3_64_intdigest(self.first) != self.digest:
            return None
        try:
            return _first.decode(self.first)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None


class DataHeader(msgspec.Struct, frozen=True, array_like=True):
    """Precedes the bytes of `blocks`. Without blocks it is a fence: on an ordered connection
    whatever of this round has not come before it is lost."""

    transfer: int
    secret: bytes
    destination_epoch: int
    round: int
    blocks: tuple[DataBlock, ...]
    wire: Wire
    """Of the bytes that follow."""
    end: End | None = None
    """With the last blocks of a round: what Close would say. It is the fence too."""


class SharedPool(msgspec.Struct, frozen=True, array_like=True):
    """First message of a sender that shares its pool; the descriptor of the memory comes with it
    (`common.kv.shared`). The receiver answers with the nonce that it finds there."""

    num_blocks: int
    block_bytes: int
    block_size: int
    """Tokens of one of these blocks."""


class SharedBlock(NamedTuple):
    """Where a block, or 16 tokens of one, lies in the sender's pool, and the generation of that
    block while it is offered."""

    block: int
    """-1: of zeros, beyond the end of the prompt."""
    generation: int
    unit: int = 0
    """Which 16 tokens; only if the sender's blocks are of another size."""


class SharedHeader(msgspec.Struct, frozen=True, array_like=True):
    """A `DataHeader` whose bytes lie in the sender's pool: `sources[i]` is `header.blocks[i]`. If
    the sizes differ, each block has as many sources as it has units of 16 tokens."""

    header: DataHeader
    sources: tuple[SharedBlock, ...]


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_to_sender: msgspec.msgpack.Decoder[ToSender] = msgspec.msgpack.Decoder(ToSender)
_first: msgspec.msgpack.Decoder[tuple[First, ...]] = msgspec.msgpack.Decoder(tuple[First, ...])
_header: msgspec.msgpack.Decoder[DataHeader] = msgspec.msgpack.Decoder(DataHeader)
_shared_pool: msgspec.msgpack.Decoder[SharedPool] = msgspec.msgpack.Decoder(SharedPool)
_shared_header: msgspec.msgpack.Decoder[SharedHeader] = msgspec.msgpack.Decoder(SharedHeader)


def encode(message: ToReceiver | ToSender | DataHeader | SharedPool | SharedHeader) -> bytes:
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes | memoryview) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"bad transfer message: {error}") from error


def decode_for_receiver(data: bytes | memoryview) -> ToReceiver:
    """Raises ProtocolError if `data` is not a valid message of a sender."""
    return _decode(_to_receiver, data)


def decode_for_sender(data: bytes | memoryview) -> ToSender:
    """Raises ProtocolError if `data` is not a valid message of a receiver."""
    return _decode(_to_sender, data)


def decode_header(data: bytes | memoryview) -> DataHeader:
    """Raises ProtocolError if `data` is not a valid data header."""
    return _decode(_header, data)


def decode_shared_pool(data: bytes | memoryview) -> SharedPool:
    """Raises ProtocolError if `data` is no valid description of a pool."""
    return _decode(_shared_pool, data)


def decode_shared_header(data: bytes | memoryview) -> SharedHeader:
    """Raises ProtocolError if `data` is not a valid header of shared blocks."""
    return _decode(_shared_header, data)
