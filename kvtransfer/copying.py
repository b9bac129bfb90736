"""Copies and digests of blocks, natively where there is a compiler.

Used by the sender (digests) and by the transports that copy (`shm`, `zmq`). One native call does
a run of blocks (`copy.cpp`) without the interpreter lock; without a compiler numpy and xxhash do
the same, in two passes and with the same digests.
"""

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_char, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from common.native import BuildError, build
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
    loaded.tandem_copy_blocks.restype = loaded.tandem_digest_blocks.restype = None
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
