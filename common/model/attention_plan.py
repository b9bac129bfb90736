"""Which KV each token of a step reads and writes: index tensors, made once per step.

The runner makes one `AttentionPlan` per step; `common.model.attention` executes it once per
layer. Indices are those of layer 0; a layer is an offset into the pool, so that the same tensors
serve all layers.

Rows of one token (decode) are gathered together, in buckets of similar context length, so that
padding at most doubles the work. Longer rows (prefill chunks) are taken one by one, in tiles of
queries, so that masks stay small and a query never meets KV past its tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from common.kv.layout import DTYPE_BYTES, KvLayout
from common.model.batch import Row

MAX_BUCKET_BYTES: Final = 64 << 20
"""KV that one bucket gathers at most per layer; a single longer row is a bucket of its own."""
TILE_TOKENS: Final = 512

Window = int | None
Masks = dict[Window, torch.Tensor | None]
"""By sliding window (None: none): what is added to the scores; None: nothing is masked."""
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Decode rows that are gathered together. `num_blocks` of KV each, `context` of them used."""

    tokens: torch.Tensor
    """[rows] int64: positions in the step's batch."""
    pages: torch.Tensor
    """[2 * rows * kv_heads * num_blocks] int64: pages, K of all rows first, then V."""
    stale: torch.Tensor | None
    """int64: gathered slots that hold no token of the row; they may hold anything, NaN too."""
    context: int
    masks: Masks
    """[rows, 1, 1, context] each."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `first .. last` of a chunk, and the first `context` tokens, which they may see."""

    first: int
    last: int
    context: int
    masks: Masks
    """[last - first, context] each. None: causal if the tile starts the sequence."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one row: `first .. last` in the step's batch."""

    first: int
    last: int
    pages: torch.Tensor | None
    """[2 * kv_heads * num_blocks] int64; None: the chunk starts its sequence and needs no KV but
    its own."""
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    store: torch.Tensor
    """[tokens * 2 * kv_heads] int64: slot of each new K and V head, K heads first per token."""
    buckets: tuple[Bucket, ...]
    chunks: tuple[Chunk, ...]


class Planner:
    """Makes the plans of one runner; holds what is the same in every step."""

    def __init__(
        self,
        layout: KvLayout,
        windows: Sequence[Window],
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_bucket_bytes: int = MAX_BUCKET_BYTES,
    ) -> None:
        self._max_bucket_bytes = max_bucket_bytes
        self._block_size = layout.block_size
        self._dtype = dtype
        self._device = device
        self._windows = frozenset(windows)
        heads = layout.num_kv_heads
        self._pages_per_block = layout.num_layers * 2 * heads
        # [2, kv_heads]: page of each head of K and V within a block's layer.
        self._head_pages: Indices = np.arange(2 * heads, dtype=np.int64).reshape(2, heads)
        self._bytes_per_block = (
            2 * heads * layout.block_size * layout.head_dim * DTYPE_BYTES[layout.dtype]
        )

    def plan(self, rows: Sequence[Row]) -> AttentionPlan:
        """The plan of one step; token positions follow the order of `rows`."""
        starts = np.cumsum([0] + [len(row.tokens) for row in rows]).tolist()
        for row in rows:
            needed = -(-(row.start + len(row.tokens)) // self._block_size)
            assert row.tokens and len(row.blocks) >= needed, (row.start, len(row.blocks), needed)
        decode = [i for i, row in enumerate(rows) if len(row.tokens) == 1]
        return AttentionPlan(
            store=self._tensor(self._store(rows)),
            buckets=tuple(
                self._bucket([rows[i] for i in bucket], [starts[i] for i in bucket])
                for bucket in self._split(rows, decode)
            ),
            chunks=tuple(
                self._chunk(row, starts[i]) for i, row in enumerate(rows) if len(row.tokens) > 1
            ),
        )

    def _tensor(self, indices: Indices) -> torch.Tensor:
        return torch.from_numpy(indices.reshape(-1)).to(self._device)

    def _store(self, rows: Sequence[Row]) -> Indices:
        blocks: list[Indices] = []
        slots: list[Indices] = []
        for row in rows:
            positions = np.arange(row.start, row.start + len(row.tokens), dtype=np.int64)
            first = row.start // self._block_size
            last = (row.start + len(row.tokens) - 1) // self._block_size
            table = np.array(row.blocks[first : last + 1], dtype=np.int64)
            blocks.append(table[positions // self._block_size - first])
            slots.append(positions % self._block_size)
        # [tokens, 2 * kv_heads]
        pages = np.concatenate(blocks)[:, None] * self._pages_per_block + self._head_pages.reshape(
            -1
        )
        return pages * self._block_size + np.concatenate(slots)[:, None]

    def _split(self, rows: Sequence[Row], decode: Sequence[int]) -> Iterator[list[int]]:
        """Groups of rows whose block tables differ in length by less than a factor of two."""
        used = {i: rows[i].start // self._block_size + 1 for i in decode}
        bucket: list[int] = []
        longest = 0
        for i in sorted(decode, key=lambda i: -used[i]):
            size = (len(bucket) + 1) * longest * self._bytes_per_block
            if bucket and (used[i] * 2 <= longest or size > self._max_bucket_bytes):
                yield sorted(bucket)
                bucket = []
            if not bucket:
                longest = used[i]
            bucket.append(i)
        if bucket:
            yield sorted(bucket)

    def _bucket(self, rows: Sequence[Row], tokens: Sequence[int]) -> Bucket:
        size = self._block_size
        lengths = np.array([row.start + 1 for row in rows], dtype=np.int64)
        context = int(lengths.max())
        used = -(-lengths // size)
        num_blocks = int(used.max())
        # Padding repeats the first block of the longest row: where there is padding that row has
        # a second block, so its first one is full and finite.
        longest = rows[int(lengths.argmax())]
        table = np.full((len(rows), num_blocks), longest.blocks[0], dtype=np.int64)
        for line, row, count in zip(table, rows, used.tolist(), strict=True):
            line[:count] = row.blocks[:count]
        # [2, rows, kv_heads, num_blocks]
        pages = table[None, :, None, :] * self._pages_per_block + self._head_pages[:, None, :, None]
        return Bucket(
            tokens=self._tensor(np.array(tokens, dtype=np.int64)),
            pages=self._tensor(pages),
            stale=self._stale(lengths, num_blocks) if int(lengths.min()) < context else None,
            context=context,
            masks=self._decode_masks(lengths, context),
        )

    def _stale(self, lengths: Indices, num_blocks: int) -> torch.Tensor | None:
        """Slots between a row's last token and the end of its last block, for all of its heads."""
        size, num_rows = self._block_size, len(lengths)
        slots = [np.arange(n, -(-n // size) * size, dtype=np.int64) for n in lengths.tolist()]
        rows = np.repeat(np.arange(num_rows), [len(part) for part in slots])
        if not len(rows):
            return None
        kinds, heads = self._head_pages.shape
        head = (
            np.arange(kinds)[:, None, None] * num_rows + rows[None, None, :]
        ) * heads + np.arange(heads)[None, :, None]
        return self._tensor(head * (num_blocks * size) + np.concatenate(slots))

    def _decode_masks(self, lengths: Indices, context: int) -> Masks:
        ends = torch.from_numpy(lengths).to(self._device)[:, None]  # [rows, 1]
        positions = torch.arange(context, device=self._device)
        masks: Masks = {}
        for window in self._windows:
            hidden = positions >= ends
            if window is not None and window < context:
                hidden |= positions < ends - window
            elif int(lengths.min()) == context:
                masks[window] = None
                continue
            masks[window] = self._additive(hidden)[:, None, None, :]
        return masks

    def _chunk(self, row: Row, first: int) -> Chunk:
        count, size = len(row.tokens), self._block_size
        pages = None
        if row.start:
            used = -(-(row.start + count) // size)
            table = np.array(row.blocks[:used], dtype=np.int64)
            # [2, kv_heads, num_blocks]
            pages = self._tensor(table * self._pages_per_block + self._head_pages[:, :, None])
        tiles = tuple(
            self._tile(row.start, begin, min(begin + TILE_TOKENS, count))
            for begin in range(0, count, TILE_TOKENS)
        )
        return Chunk(first, first + count, pages, tiles)

    def _tile(self, start: int, first: int, last: int) -> Tile:
        context = start + last
        queries = torch.arange(start + first, context, device=self._device)[:, None]
        positions = torch.arange(context, device=self._device)
        masks: Masks = {}
        for window in self._windows:
            hidden = positions > queries
            if window is not None and window < context:
                hidden |= positions <= queries - window
            elif start + first == 0:
                masks[window] = None
                continue
            masks[window] = self._additive(hidden)
        return Tile(first, last, context, masks)

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))
