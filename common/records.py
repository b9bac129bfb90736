"""What Redis holds: the names of the keys and the form of the records of a deployment.

    tandem:{ns}:workers              set of worker ids
    tandem:{ns}:worker:{id}          hash with TTL, one JSON value per field of WorkerInfo
    tandem:{ns}:blocks:{id}@{epoch}  msgpack Snapshot, TTL 60 s
    tandem:{ns}:api-keys             hash, SHA-256 of a key -> tenant; written by operators
    tandem:{ns}:events               stream; field `e` of each entry is a msgpack Event
    tandem:{ns}:routers, tandem:{ns}:inflight:{router}   see `router.inflight`

Workers write (`common.registry`), routers read (`router.directory`). A worker numbers its
Changed events in each epoch; a Snapshot and a Digest describe its blocks after the event with
their number, so that a reader can join them with the stream or see that it missed some.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from common.blockhash import HASH_BYTES, BlockHash
from common.errors import ProtocolError
from common.messages import WorkerInfo

SNAPSHOT_TTL_S: Final = 60
SHARED_TTL_S: Final = 3_600
"""Life of the keys that no single worker owns, after the last worker renewed them."""
MAX_EVENTS: Final = 10_000
"""About as many events stay in the stream; a reader that is slower reads snapshots."""
EVENT_HASHES: Final = 512
"""Hashes in one Changed event at most."""


@dataclass(frozen=True, slots=True)
class Keys:
    namespace: str

    @property
    def workers(self) -> str:
        return f"tandem:{self.namespace}:workers"

    @property
    def events(self) -> str:
        return f"tandem:{self.namespace}:events"

    @property
    def api_keys(self) -> str:
        return f"tandem:{self.namespace}:api-keys"

    @property
    def routers(self) -> str:
        return f"tandem:{self.namespace}:routers"

    def inflight(self, router: str) -> str:
        return f"tandem:{self.namespace}:inflight:{router}"

    def worker(self, id: str) -> str:
        return f"tandem:{self.namespace}:worker:{id}"

    def blocks(self, id: str, epoch: int) -> str:
        return f"tandem:{self.namespace}:blocks:{id}@{epoch}"


class StreamId(NamedTuple):
    """Of a stream entry; sorts in the order of the stream."""

    ms: int
    number: int

    @classmethod
    def parse(cls, text: bytes | str) -> "StreamId":
        """Raises ProtocolError."""
        try:
            ms, _, number = (text.decode() if isinstance(text, bytes) else text).partition("-")
            return cls(int(ms), int(number))
        except ValueError as error:
            raise ProtocolError(f"bad stream id {text!r}") from error

    def __str__(self) -> str:
        return f"{self.ms}-{self.number}"


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """The worker is new, began a new epoch or changed its description: read it now."""

    worker: str
    epoch: int


class Left(msgspec.Struct, frozen=True, tag="left"):
    worker: str
    epoch: int


class Changed(msgspec.Struct, frozen=True, tag="changed"):
    """Blocks that can be matched now, and blocks that no longer can; packed hashes."""

    worker: str
    epoch: int
    seq: int
    stored: bytes
    evicted: bytes


class Digest(msgspec.Struct, frozen=True, tag="digest"):
    """Number and xor of all hashes that the worker holds; also a sign of life."""

    worker: str
    epoch: int
    seq: int
    count: int
    xor: bytes


Event = Joined | Left | Changed | Digest


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """All blocks of a worker after its event `seq`; later events come after `stream_id`."""

    seq: int
    stream_id: str
    hashes: bytes


_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_snapshots: msgspec.msgpack.Decoder[Snapshot] = msgspec.msgpack.Decoder(Snapshot)


def decode_event(fields: dict[bytes, bytes]) -> Event:
    """Raises ProtocolError."""
    try:
        return _events.decode(fields[b"e"])
    except (KeyError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ProtocolError(f"bad event: {error}") from error


def decode_snapshot(data: bytes) -> Snapshot:
    """Raises ProtocolError."""
    try:
        return _snapshots.decode(data)
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ProtocolError(f"bad snapshot: {error}") from error


def encode_info(info: WorkerInfo) -> dict[str, bytes]:
    """The hash of a worker, readable in redis-cli."""
    return {name: msgspec.json.encode(getattr(info, name)) for name in info.__struct_fields__}


def decode_info(fields: dict[bytes, bytes]) -> WorkerInfo:
    """Raises ProtocolError."""
    try:
        values = {name.decode(): msgspec.json.decode(value) for name, value in fields.items()}
        return msgspec.convert(values, WorkerInfo)
    except (UnicodeDecodeError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"bad worker: {error}") from error


def unpack_hashes(data: bytes) -> list[BlockHash]:
    """Raises ProtocolError if `data` is not a whole number of hashes."""
    if len(data) % HASH_BYTES:
        raise ProtocolError(f"{len(data)} bytes of hashes")
    return [BlockHash(data[i : i + HASH_BYTES]) for i in range(0, len(data), HASH_BYTES)]


def xor_hashes(hashes: Iterable[BlockHash]) -> int:
    result = 0
    for h in hashes:
        result ^= int.from_bytes(h, "little")
    return result
