"""The stream of block events in Redis, read in order by one cursor; owned by `router.directory`."""

from typing import Any, Final

from redis.asyncio import Redis

from common.errors import ProtocolError
from common.messages import WorkerInfo
from common.records import Changed, Digest, Keys, Snapshot, StreamId, decode_event

BATCH: Final = 256
"""Events that are read at a time."""
REPLAY_MS: Final = 15_000
"""Events that a snapshot lacks are younger than this: it is rewritten after each change."""
START: Final = StreamId(0, 0)


class EventStream:
    """All methods raise redis errors; those of this class say so when they raise others."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client = client
        self._key = keys.events
        self._cursor: StreamId | None = None
        """The last event that was read; None: not begun."""

    async def settle(self) -> None:
        """Begin at the present end (what came before is in the snapshots), or go back to the
        start if Redis was emptied or lost what was read already."""
        last: Any = await self._client.xrevrange(self._key, count=1)
        top = StreamId.parse(last[0][0]) if last else START
        if self._cursor is None:
            self._cursor = top
        elif top < self._cursor:
            self._cursor = START

    async def read(self, block_s: float) -> list[dict[bytes, bytes]]:
        """The next events; waits up to `block_s` for the first one."""
        assert self._cursor is not None, "read before settle"
        block_ms = max(1, round(block_s * 1000))  # 0 would mean for ever
        reply: Any = await self._client.xread(
            {self._key: str(self._cursor)}, count=BATCH, block=block_ms
        )
        events: list[dict[bytes, bytes]] = []
        for _, entries in reply:
            for id, fields in entries:
                self._cursor = StreamId.parse(id)
                events.append(fields)
        return events

    async def changes_after(self, snapshot: Snapshot, info: WorkerInfo) -> list[Changed] | None:
        """The worker's changes that the snapshot lacks and that were read already; None if some
        of them are gone. Raises ProtocolError."""
        assert self._cursor is not None, "read before settle"
        changes: list[Changed] = []
        seq = snapshot.seq
        start = max(StreamId.parse(snapshot.stream_id), StreamId(self._cursor.ms - REPLAY_MS, 0))
        while start < self._cursor:
            after = StreamId(start.ms, start.number + 1)
            entries: Any = await self._client.xrange(
                self._key, min=str(after), max=str(self._cursor), count=BATCH
            )
            if not entries:
                break
            for id, fields in entries:
                start = StreamId.parse(id)
                event = _readable(fields)
                if not isinstance(event, Changed | Digest) or event.seq <= seq:
                    continue
                if event.worker != info.id or event.epoch != info.epoch:
                    continue
                if isinstance(event, Digest) or event.seq != seq + 1:
                    return None
                changes.append(event)
                seq = event.seq
        return changes


def _readable(fields: dict[bytes, bytes]) -> object:
    """The event, or None: whoever read the stream has counted the bad ones already."""
    try:
        return decode_event(fields)
    except ProtocolError:
        return None
