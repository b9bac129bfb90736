"""Blocks in memory that processes of this machine can map: made by the pool, read by its peers.

    [blocks][generation of each block, int64][nonce]

The memory has no name and cannot shrink (no SIGBUS for a reader), and who did not make it cannot
write to it: the kernel sees to that. A generation is raised before its block is written anew, so
a reader that finds the same one before and after a copy has copied what was offered.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import weakref
from typing import Final

import numpy as np

from common.errors import ProtocolError

NONCE_BYTES: Final = 16
SEAL_FUTURE_WRITE: Final = 0x10
"""New mappings are read-only. Not in `fcntl` before Python 3.13."""
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | SEAL_FUTURE_WRITE
_GENERATION_BYTES: Final = 8


class SharedBlocks:
    """The writable side; one per pool, for the life of the process."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Pages that nobody writes take no memory. Raises OSError where the kernel has no sealed
        memory or not that much."""
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        """In the memory: who can tell it has really mapped it."""
        size = _size(num_blocks, block_bytes)
        self.fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        try:
            os.ftruncate(self.fd, size)
            memory = mmap.mmap(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot share {size:,} bytes: {error}") from error
        ask_for_huge_pages(memory)
        memory[size - NONCE_BYTES :] = self.nonce
        view = memoryview(memory)
        self.blocks = view[: num_blocks * block_bytes]
        """Writable, beginning at a page."""
        self.generations = view[_generations(num_blocks, block_bytes) : -NONCE_BYTES].cast("q")
        """[num_blocks], all 0 at first."""


class PeerBlocks:
    """The blocks of another process, read-only."""

    def __init__(self, fd: int, num_blocks: int, block_bytes: int) -> None:
        """`fd` may be closed afterwards. Raises ProtocolError if it is no memory as above, OSError
        if it cannot be mapped."""
        if num_blocks < 1 or block_bytes < 1:
            raise ProtocolError(f"{num_blocks} shared blocks of {block_bytes} bytes")
        size = _size(num_blocks, block_bytes)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ProtocolError("shared blocks are in no sealed memory") from error
        if seals & SEALS != SEALS or os.fstat(fd).st_size != size:
            raise ProtocolError(f"shared memory with seals {seals:#x} is not {size} fixed bytes")
        self.num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        ask_for_huge_pages(self._memory)
        self.memory = memoryview(self._memory)[: num_blocks * block_bytes]
        """Block after block; they may change at any time."""
        self.address = int(np.frombuffer(self.memory, dtype=np.uint8).ctypes.data)
        """Of `memory`, until `close`."""
        start = _generations(num_blocks, block_bytes)
        self._generations = memoryview(self._memory)[start:-NONCE_BYTES].cast("q")
        self.nonce = self._memory[size - NONCE_BYTES :]

    def slab(self, block: int) -> memoryview:
        """The bytes of one block, read-only."""
        return self.memory[block * self._block_bytes : (block + 1) * self._block_bytes]

    def generation(self, block: int) -> int:
        return int(self._generations[block])

    def close(self) -> None:
        """Unmap; no view of `memory` may be left."""
        self.memory.release()
        self._generations.release()
        self._memory.close()


def ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Larger pages where the kernel gives them to those who ask (`shmem_enabled` is `advise`)."""
    # EINVAL where the kernel has none: the pages stay small.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)


def _generations(num_blocks: int, block_bytes: int) -> int:
    """Where the generations begin."""
    return -(-num_blocks * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _size(num_blocks: int, block_bytes: int) -> int:
    words = num_blocks * _GENERATION_BYTES
    return _generations(num_blocks, block_bytes) + words + NONCE_BYTES
