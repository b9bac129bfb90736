"""Copies and digests of blocks, natively where there is a compiler.

Used by the sender (digests, and blocks that are cut to the receiver's size) and by the transports
that copy (`shm`, `ucx`, `zmq`). One native call does a run of blocks (`copy.cpp`) without the
interpreter lock; without a compiler numpy and xxhash do the same, in two passes and with the same
digests.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from ctypes import c_char, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from common.native import BuildError, build
from kvtransfer.cutting import Cutting, Piece
from kvtransfer.memory import digest

log = logging.getLogger("tandem.transfer")

STRIPE_BYTES: Final = 64
MIN_BYTES: Final = 256
"""Blocks of other sizes are not for the native pass."""
_SOURCE: Final = Path(__file__).parent / "copy.cpp"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled pass, compiled by the first call on a machine; None where that cannot be."""
    try:
        loaded = ctypes.CDLL(str(build("the block copies", _SOURCE, (), None)))
    except (BuildError, OSError) as error:
        log.warning("no native copies of KV blocks, which are faster: %s", error)
        return None
    loaded.tandem_copy_blocks.argtypes = (c_int64, c_int64, c_void_p, c_void_p, c_void_p)
    loaded.tandem_digest_blocks.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
    loaded.tandem_gather_blocks.argtypes = (*[c_int64] * 5, c_void_p, c_void_p, c_void_p)
    loaded.tandem_copy_blocks.restype = loaded.tandem_digest_blocks.restype = None
    loaded.tandem_gather_blocks.restype = None
    return loaded


def digest_blocks(run: memoryview, block_bytes: int) -> list[int]:
    """The digest of each of the blocks that lie one behind the other in `run`."""
    native = _native(block_bytes)
    if native is None:
        starts = range(0, len(run), block_bytes)
        return [digest(run[start : start + block_bytes]) for start in starts]
    count = len(run) // block_bytes
    digests = (c_uint64 * count)()
    native.tandem_digest_blocks(count, block_bytes, address_of(run), digests)
    return list(digests)


def copy_blocks(
    source: memoryview,
    address: int,
    offsets: Sequence[int],
    slabs: Sequence[memoryview | None],
    block_bytes: int,
) -> list[int | None]:
    """Copy the blocks that begin at `offsets` of `source` to `slabs`, in order; None skips one.

    address: of `source`, see `address_of`. Returns the digest of each slab as it was written, None
    where it was skipped.
    """
    pairs = [(at, slab) for at, slab in zip(offsets, slabs, strict=True) if slab is not None]
    native = _native(block_bytes)
    if native is None:
        digests = [_copy(source[at : at + block_bytes], slab) for at, slab in pairs]
    else:
        count = len(pairs)
        pointers = c_void_p * count
        sources = pointers(*[address + at for at, _ in pairs])
        # A view is held by whoever called: its memory does not go away meanwhile.
        targets = pointers(*[ctypes.addressof(c_char.from_buffer(slab)) for _, slab in pairs])
        written = (c_uint64 * count)()
        native.tandem_copy_blocks(count, block_bytes, sources, targets, written)
        digests = list(written)
    found = iter(digests)
    return [None if slab is None else next(found) for slab in slabs]


def gather_blocks(
    cutting: Cutting,
    pool: Callable[[int], memoryview],
    address: int,
    pieces: Sequence[Piece],
    slabs: Sequence[memoryview | None] | None = None,
) -> list[int | None]:
    """Put blocks together from pieces of the blocks of another size, in one pass.

    pool: the bytes of a source block; address: of block 0, see `address_of`. pieces:
    `cutting.pieces` of each block in turn. slabs: where the blocks go, None skips one; without
    it nothing is written. Returns the digest of each block, None where it was skipped.
    """
    per_block = cutting.pieces
    count = len(pieces) // per_block
    chosen = [i for i in range(count) if slabs is None or slabs[i] is not None]
    targets = None if slabs is None else [slab for slab in slabs if slab is not None]
    used = [piece for i in chosen for piece in pieces[i * per_block : (i + 1) * per_block]]
    native = library() if cutting.piece_bytes % STRIPE_BYTES == 0 else None
    if native is None or cutting.block_bytes < MIN_BYTES:
        starts = range(0, len(used), per_block)
        found = [_gather(cutting, pool, used[i : i + per_block]) for i in starts]
        for block, slab in zip(found, targets or (), strict=False):
            np.copyto(np.frombuffer(slab, dtype=np.uint8), block)
        digests = [digest(block.data) for block in found]
    else:
        at = [
            None
            if piece.block < 0
            else address + piece.block * cutting.source_bytes + piece.unit * cutting.piece_bytes
            for piece in used
        ]
        sources = (c_void_p * len(at))(*at)
        written = (c_uint64 * len(chosen))()
        rooms = None
        if targets is not None:
            addresses = [ctypes.addressof(c_char.from_buffer(slab)) for slab in targets]
            rooms = (c_void_p * len(addresses))(*addresses)
        native.tandem_gather_blocks(
            len(chosen), cutting.rows, per_block, cutting.piece_bytes, cutting.stride,
            sources, rooms, written,
        )  # fmt: skip
        digests = list(written)
    result: list[int | None] = [None] * count
    for i, value in zip(chosen, digests, strict=True):
        result[i] = value
    return result


def address_of(view: memoryview) -> int:
    """Where its bytes are. The view must not be released while that is used."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _native(block_bytes: int) -> ctypes.CDLL | None:
    """The native pass, if it can do blocks of this size."""
    return None if block_bytes % STRIPE_BYTES or block_bytes < MIN_BYTES else library()


def _copy(source: memoryview, slab: memoryview) -> int:
    # numpy releases the interpreter lock for the copy; a memoryview assignment would not.
    np.copyto(np.frombuffer(slab, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
    return digest(slab)


def _gather(
    cutting: Cutting, pool: Callable[[int], memoryview], pieces: Sequence[Piece]
) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """[block_bytes] The bytes of one block, by numpy."""
    size = cutting.piece_bytes
    block = np.zeros((cutting.rows, cutting.pieces, size), dtype=np.uint8)
    for i, piece in enumerate(pieces):
        if piece.block >= 0:
            rows = np.frombuffer(pool(piece.block), dtype=np.uint8).reshape(cutting.rows, -1)
            block[:, i] = rows[:, piece.unit * size : (piece.unit + 1) * size]
    return block.reshape(-1)
