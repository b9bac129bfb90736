"""What a step brings to the GPU: all of its numbers in one array of int32, copied at once.

`pack` makes the array on the host, `Step` names its parts on the device. Rows of one token come
first (decode), longer ones after them (prefill chunks), whatever their order in the batch was.
Made by `common.model.triton.decoder` once per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from common.model.batch import Row
from common.model.triton.decode import num_parts

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Packed:
    """One step on the host."""

    numbers: Numbers
    """The parts of `Step` in their order, one after another."""
    sizes: tuple[int, ...]
    num_parts: int
    """Parts of the workspace of decode attention that the step takes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the device; every tensor is int32 and a part of one buffer."""

    tokens: torch.Tensor
    """[tokens]: token ids."""
    positions: torch.Tensor
    """[tokens]"""
    slots: torch.Tensor
    """[tokens]: block * block_size + slot; -1: a token of nobody."""
    samples: torch.Tensor
    """[sampled rows]: indices of tokens."""
    lengths: torch.Tensor
    """[decode rows]: context, the token included."""
    part_starts: torch.Tensor
    """[decode rows]: first part in the workspace."""
    decode_tables: torch.Tensor
    """[decode rows]: where the row's table begins in `blocks`."""
    row_starts: torch.Tensor
    """[chunks]: position of the first token."""
    row_tokens: torch.Tensor
    """[chunks]: index of the first token in the step."""
    row_counts: torch.Tensor
    """[chunks]: number of tokens."""
    table_starts: torch.Tensor
    """[chunks]: where the row's table begins in `blocks`."""
    tile_rows: torch.Tensor
    """[tiles]: chunk of each tile of queries."""
    tile_firsts: torch.Tensor
    """[tiles]: its first token within the chunk."""
    blocks: torch.Tensor
    """[any]: the block tables, one after another."""
    num_parts: int

    @staticmethod
    def of(buffer: torch.Tensor, packed: Packed) -> "Step":
        """buffer: [len(packed.numbers) or more] int32."""
        parts = buffer[: sum(packed.sizes)].split(list(packed.sizes))
        return Step(*parts, packed.num_parts)  # type: ignore[call-arg]


def pack(
    rows: Sequence[Row],
    sampling: Sequence[int],
    block_size: int,
    per_tile: int,
    *,
    invariant: bool = False,
    bucket: int = 0,
) -> Packed:
    """The numbers of a step.

    sampling: indices of rows whose last token is looked at. per_tile: tokens of a tile of queries.
    invariant: rows of one token are chunks, too. bucket: pad to this many rows, all decode, and
    look at all of them; `sampling` is not needed then.
    """
    if bucket:
        assert len(rows) <= bucket and all(len(row.tokens) == 1 for row in rows), bucket
    single = [i for i, row in enumerate(rows) if len(row.tokens) == 1 and not invariant]
    longer = [i for i, row in enumerate(rows) if len(row.tokens) > 1 or invariant]
    order = [rows[i] for i in (*single, *longer)]
    counts = np.array([len(row.tokens) for row in order], np.int32)
    starts = np.array([row.start for row in order], np.int32)
    tables = np.array([len(row.blocks) for row in order], np.int32)
    total = int(counts.sum())
    tokens = np.fromiter(chain.from_iterable(row.tokens for row in order), np.int32, total)
    blocks = np.fromiter(
        chain.from_iterable(row.blocks for row in order), np.int32, int(tables.sum())
    )
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    table_starts = np.cumsum(tables, dtype=np.int32) - tables
    positions = np.arange(total, dtype=np.int32) + np.repeat(starts - firsts, counts)
    slots = (
        blocks[np.repeat(table_starts, counts) + positions // block_size] * block_size
        + positions % block_size
    )
    place = np.empty(len(rows), np.int32)
    place[[*single, *longer]] = firsts + counts - 1
    num = len(single)
    lengths = starts[:num] + 1
    parts = np.array([num_parts(length) for length in lengths.tolist()], np.int32)
    chunk_counts = counts[num:]
    tiles = -(-chunk_counts // per_tile)
    tile_rows = np.repeat(np.arange(len(longer), dtype=np.int32), tiles)
    tile_firsts = np.arange(len(tile_rows), dtype=np.int32) - np.repeat(
        np.cumsum(tiles, dtype=np.int32) - tiles, tiles
    )
    tile_firsts *= per_tile
    # The tiles with the longest context first, so that none of them is left for the end.
    longest = np.argsort(-(starts[num:][tile_rows] + tile_firsts), kind="stable")
    samples = place[list(sampling)]
    pad = bucket - len(rows) if bucket else 0
    if bucket:
        samples = np.arange(bucket, dtype=np.int32)
    part_starts = np.cumsum(parts, dtype=np.int32) - parts
    arrays: list[Numbers] = [
        _padded(tokens, pad, 0),
        _padded(positions, pad, 0),
        _padded(slots, pad, -1),
        samples,
        _padded(lengths, pad, 0),
        _padded(part_starts, pad, 0),
        _padded(table_starts[:num], pad, 0),
        starts[num:],
        firsts[num:],
        chunk_counts,
        table_starts[num:],
        tile_rows[longest],
        tile_firsts[longest],
        blocks,
    ]
    numbers = np.concatenate(arrays, dtype=np.int32, casting="unsafe")
    return Packed(numbers, tuple(map(len, arrays)), int(parts.sum()))


def _padded(array: Numbers, count: int, value: int) -> Numbers:
    return np.pad(array, (0, count), constant_values=value) if count else array
