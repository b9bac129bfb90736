"""A model without arithmetic: deterministic tokens, and KV that betrays foreign or missing blocks.

The KV of a token is a digest of all tokens up to it, written to its slot in K and in V. When a
token is sampled the stub recomputes the digests of the whole context from the tokens themselves
and compares: a block of another request, a block not yet there or a wrong position fails an
assert. The token drawn depends on (seed, choice, position) only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from common.kv.blocks import BlockManager
from common.kv.layout import KvLayout
from common.kv.shared import SharedBlocks
from common.messages import TokenLogprob
from common.metrics import WorkerMetrics
from common.model.batch import Row, Sample, Sampled
from common.schedule import Limits

VOCAB = 1000
EOS = 999
STAMP_BYTES = 16
LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=16, dtype="float32")
"""One slot has 16 bytes of K and 16 of V."""


class StubPool:
    """Bytes of a pool; satisfies `kvtransfer.memory.BlockMemory`."""

    shared: SharedBlocks | None = None
    """Peers may not map it."""

    def __init__(self, num_blocks: int, layout: KvLayout = LAYOUT) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        self._data = memoryview(bytearray(b"\xff" * (num_blocks * self.block_bytes)))

    def slab(self, block: int) -> memoryview:
        return self.run(block, 1)

    def run(self, block: int, count: int) -> memoryview:
        return self._data[block * self.block_bytes : (block + count) * self.block_bytes]


class SharedStubPool(StubPool):
    """One that peers may map."""

    def __init__(self, num_blocks: int, layout: KvLayout = LAYOUT) -> None:
        super().__init__(num_blocks, layout)
        self.shared = SharedBlocks(num_blocks, self.block_bytes)
        self._data = self.shared.blocks
        self._data[:] = b"\xff" * len(self._data)


def stub_token(seed: int, choice: int, position: int) -> int:
    """Never the end-of-sequence token."""
    digest = blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % EOS


def stamp(before: bytes, token: int) -> bytes:
    """What is written for `token` after a token whose stamp is `before` (empty: the first)."""
    return blake2b(before + token.to_bytes(4, "little"), digest_size=STAMP_BYTES).digest()


@dataclass(frozen=True)
class Stepped:
    """A step that the stub was asked for, and that it computes when it is collected."""

    runner: "StubRunner"
    rows: Sequence[Row]

    def collect(self) -> list[tuple[Sampled, ...]]:
        return self.runner.step(self.rows)


class StubRunner:
    """Satisfies `common.engine.Runner`."""

    overlaps = False

    def __init__(self, pool: StubPool) -> None:
        self.pool = pool
        self.batches: list[list[tuple[int, int]]] = []
        """(start, count) of each row of each step."""

    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        self.batches.append([(row.start, len(row.tokens)) for row in rows])
        written: set[tuple[int, int]] = set()
        for row in rows:
            self._write(row, written)
        return [tuple(self._sample(row, sample) for sample in row.samples) for row in rows]

    def launch(self, rows: Sequence[Row]) -> "Stepped":
        return Stepped(self, rows)

    def copy_block(self, source: int, target: int) -> None:
        self.pool.slab(target)[:] = self.pool.slab(source)

    def _write(self, row: Row, written: set[tuple[int, int]]) -> None:
        last = self._read(row.blocks, row.start - 1)[0] if row.start else b""
        for position, token in enumerate(row.tokens, row.start):
            last = stamp(last, token)
            size = self.pool.layout.block_size
            place = (row.blocks[position // size], position % size)
            assert place not in written, f"two rows write slot {place}"
            written.add(place)
            for kv in self._slots(row.blocks, position):
                kv[:] = last

    def _sample(self, row: Row, sample: Sample) -> Sampled:
        expected = b""
        for position, token in enumerate(sample.tokens):
            expected = stamp(expected, token)
            found = self._read(row.blocks, position)
            assert found == (expected, expected), f"foreign KV at position {position}"
        token = stub_token(sample.params.seed, sample.choice, len(sample.tokens))
        logprob = None if sample.params.logprobs is None else TokenLogprob(token, -1.0)
        return Sampled(token, logprob)

    def _read(self, blocks: Sequence[int], position: int) -> tuple[bytes, bytes]:
        key, value = self._slots(blocks, position)
        return bytes(key), bytes(value)

    def _slots(self, blocks: Sequence[int], position: int) -> tuple[memoryview, memoryview]:
        size = self.pool.layout.block_size
        slab = self.pool.slab(blocks[position // size])
        half, at = len(slab) // 2, position % size * STAMP_BYTES
        return slab[at : at + STAMP_BYTES], slab[half + at : half + at + STAMP_BYTES]


def stub_limits(num_blocks: int, **changes: object) -> Limits:
    """Limits of a tiny worker; any field may be changed."""
    values: dict[str, object] = {
        "block_size": LAYOUT.block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 4096,
        "vocab_size": VOCAB,
        "eos_token_ids": (EOS,),
        "content_id": "stub",
    }
    return Limits(**(values | changes))  # type: ignore[arg-type]


def stub_parts(
    num_blocks: int, role: str, **changes: object
) -> tuple[StubRunner, BlockManager, Limits, WorkerMetrics]:
    """The arguments of an engine with a stub model and a real block manager."""
    limits = stub_limits(num_blocks, **changes)
    layout = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=4, block_size=limits.block_size, dtype="float32"
    )
    pool = SharedStubPool(num_blocks, layout)
    assert pool.shared is not None
    blocks = BlockManager(num_blocks, pool.shared.generations)
    return StubRunner(pool), blocks, limits, WorkerMetrics(role)
