import numpy as np
import xxhash

from kvtransfer.memory import copy_blocks, digest
from tests.kvtransfer.pool import BytePool


def test_copies_runs_to_slabs_and_skips() -> None:
    source, target = BytePool(8, 48), BytePool(8, 48)
    contents = [source.fill(block, f"block {block}") for block in range(8)]
    frames = [source.run(2, 3), source.run(7, 1)]
    slabs = [target.slab(6), None, target.slab(0), target.slab(1)]
    digests = copy_blocks(frames, slabs, 48)
    assert [target.read(block) for block in (6, 0, 1)] == [contents[2], contents[4], contents[7]]
    assert not any(target.run(2, 4))
    assert digests == [
        xxhash.xxh3_64_intdigest(contents[2]),
        None,
        xxhash.xxh3_64_intdigest(contents[4]),
        xxhash.xxh3_64_intdigest(contents[7]),
    ]


def test_the_digest_sees_every_bit() -> None:
    slab = np.zeros(64, dtype=np.uint8)
    digests = {digest(slab.data)}
    for bit in range(512):
        slab[:] = 0
        slab[bit // 8] = 1 << bit % 8
        digests.add(digest(slab.data))
    assert len(digests) == 513
