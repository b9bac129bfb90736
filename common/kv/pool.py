"""The memory of a worker's KV cache: one tensor of blocks, and its bytes for transfers.

Made once at the start of a worker. The model writes and reads `tensor`; transfers read and write
`slab` and `run`, only for blocks that they were handed. Who may do what to which block is decided
by `common.kv.blocks`. On CPU the memory is shared, where the kernel can do that safely: peers on
the same machine copy blocks out of it.
"""

import mmap

import torch

from common.errors import ConfigError
from common.kv.layout import KvLayout
from common.kv.memory import memory_for
from common.kv.shared import SharedBlocks


class KvPool:
    """`num_blocks` blocks of one layout; a block of all layers is one contiguous slab."""

    layout: KvLayout
    num_blocks: int
    tensor: torch.Tensor
    """[num_blocks, layer, k|v, kv_head, slot, head_dim], contiguous."""
    shared: SharedBlocks | None
    """The same memory for peers on this machine; None on GPUs and where it cannot be shared."""
    generations: memoryview | None
    """Where the block manager says that a block is about to be used anew; see `shared`."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: torch.device | str = "cpu",
        *,
        poison: bool = False,
    ) -> None:
        """Memory of blocks that were never written is undefined, on CPU not even touched.

        poison: fill every slot with NaN, so that a read of what was never written shows.
        Raises ConfigError if the device has not that much memory.
        """
        assert num_blocks > 0, num_blocks
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        num_bytes = memory_for(layout, num_blocks)
        self.shared = _share(num_blocks, self.block_bytes) if str(device) == "cpu" else None
        self.generations = self.shared.generations if self.shared is not None else None
        if self.shared is not None:
            memory = torch.frombuffer(self.shared.blocks, dtype=torch.uint8)
        else:
            memory = _allocate(num_bytes, torch.device(device))
        self.tensor = memory.view(getattr(torch, layout.dtype)).view(
            num_blocks, *layout.block_shape
        )
        if poison:
            self.tensor.fill_(float("nan"))
        self._bytes = memory.numpy().data if memory.device.type == "cpu" else None

    def slab(self, block: int) -> memoryview:
        """Writable bytes of one block of a CPU pool, without a copy."""
        return self.run(block, 1)

    def run(self, block: int, count: int) -> memoryview:
        """Writable bytes of `count` consecutive blocks of a CPU pool, without a copy."""
        assert self._bytes is not None, self.tensor.device
        assert 0 <= block and 0 < count <= self.num_blocks - block, (block, count, self.num_blocks)
        return self._bytes[block * self.block_bytes : (block + count) * self.block_bytes]


def _share(num_blocks: int, block_bytes: int) -> SharedBlocks | None:
    """Memory for a pool on CPU that peers can map; None where there is no such memory."""
    try:
        return SharedBlocks(num_blocks, block_bytes)
    except (AttributeError, OSError):  # AttributeError: not on Linux
        return None


def _allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 on `device`, on CPU beginning at a page.

    Pages that nobody writes take no memory: large allocations are anonymous mappings.
    """
    slack = mmap.PAGESIZE if device.type == "cpu" else 0
    try:
        memory = torch.empty(num_bytes + slack, dtype=torch.uint8, device=device)
    except (RuntimeError, TypeError) as error:  # TypeError: more than 64 bits
        raise ConfigError(f"cannot allocate {num_bytes:,} bytes of KV cache on {device}") from error
    start = -memory.data_ptr() % mmap.PAGESIZE if slack else 0
    return memory[start : start + num_bytes]
