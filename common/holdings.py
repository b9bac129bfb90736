"""The blocks that a worker holds, as numbered changes, digests and snapshots. Pure: no I/O.

Owned by `common.registry.Registration`. Memory is bounded by the number of blocks: changes that
nobody was told of yet cancel out.
"""

from collections.abc import Iterable

from common.blockhash import HASH_BYTES, BlockHash
from common.records import EVENT_HASHES, Changed, Digest, Snapshot, xor_hashes


class Holdings:
    """Of one worker in one epoch. `seq` is the number of the last change that was taken."""

    def __init__(self, worker: str, epoch: int, hashes: Iterable[BlockHash] = ()) -> None:
        self.seq = 0
        self._worker = worker
        self._epoch = epoch
        self._hashes = set(hashes)
        self._xor = xor_hashes(self._hashes)
        self._pending: dict[BlockHash, bool] = {}
        """Changes that were not taken: True stored, False evicted."""

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def note(self, stored: Iterable[BlockHash], evicted: Iterable[BlockHash]) -> None:
        """Blocks that became matchable, then blocks that no longer are."""
        for h in stored:
            if h not in self._hashes:
                self._hashes.add(h)
                self._turn(h, True)
        for h in evicted:
            if h in self._hashes:
                self._hashes.remove(h)
                self._turn(h, False)

    def take_changes(self) -> list[Changed]:
        """What was noted since the last call, in events of at most EVENT_HASHES hashes."""
        pending = list(self._pending.items())
        self._pending.clear()
        changes = []
        for i in range(0, len(pending), EVENT_HASHES):
            part = pending[i : i + EVENT_HASHES]
            self.seq += 1
            stored = b"".join(h for h, is_stored in part if is_stored)
            evicted = b"".join(h for h, is_stored in part if not is_stored)
            changes.append(Changed(self._worker, self._epoch, self.seq, stored, evicted))
        return changes

    def skip(self) -> None:
        """Drop what was noted and the next number: who follows must read a snapshot."""
        self._pending.clear()
        self.seq += 1

    def digest(self) -> Digest:
        """Only right after `take_changes` or `skip`."""
        assert not self._pending, f"{len(self._pending)} changes are in no event"
        xor = self._xor.to_bytes(HASH_BYTES, "little")
        return Digest(self._worker, self._epoch, self.seq, len(self._hashes), xor)

    def snapshot(self, stream_id: str) -> Snapshot:
        """Only right after `take_changes` or `skip`; `stream_id`: see Snapshot."""
        assert not self._pending, f"{len(self._pending)} changes are in no event"
        return Snapshot(self.seq, stream_id, b"".join(self._hashes))

    def _turn(self, h: BlockHash, stored: bool) -> None:
        self._xor ^= int.from_bytes(h, "little")
        if h in self._pending:
            del self._pending[h]  # undoes what nobody was told
        else:
            self._pending[h] = stored
