"""A pool of bytes and an endpoint's identity for tests of transfers."""

from common.kv.shared import SharedBlocks
from common.messages import KvLayoutInfo
from kvtransfer.identity import EndpointIdentity
from kvtransfer.protocol import Wire

BLOCK_SIZE = 16
LAYOUT = KvLayoutInfo(
    block_size=BLOCK_SIZE, num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32"
)

WIRE = Wire.of(LAYOUT)


def identity(id: str, epoch: int, layout: KvLayoutInfo = LAYOUT) -> EndpointIdentity:
    return EndpointIdentity(id=id, epoch=epoch, content_id="c0ffee", layout=layout)


class BytePool:
    """`BlockMemory` over shared memory; block contents are made from a seed."""

    def __init__(self, num_blocks: int, block_bytes: int = 64) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.shared: SharedBlocks | None = SharedBlocks(num_blocks, block_bytes)
        self.memory = self.shared.blocks

    def slab(self, block: int) -> memoryview:
        return self.run(block, 1)

    def run(self, block: int, count: int) -> memoryview:
        assert 0 <= block and 0 < count <= self.num_blocks - block, (block, count)
        return self.memory[block * self.block_bytes : (block + count) * self.block_bytes]

    def raise_generation(self, block: int) -> None:
        """What a block manager does before a block is written anew."""
        assert self.shared is not None
        self.shared.generations[block] += 1

    def fill(self, block: int, seed: str) -> bytes:
        """Write the content that `seed` names; returns it."""
        content = (seed.encode() * (self.block_bytes // len(seed) + 1))[: self.block_bytes]
        self.slab(block)[:] = content
        return content

    def read(self, block: int) -> bytes:
        return bytes(self.slab(block))
