"""Memory that peers map: what they see, and what they cannot do."""

import mmap
import os

import pytest

from common.errors import ProtocolError
from common.kv.blocks import BlockManager
from common.kv.layout import KvLayout
from common.kv.pool import KvPool
from common.kv.shared import PeerBlocks, SharedBlocks


def test_a_peer_sees_blocks_generations_and_nonce() -> None:
    shared = SharedBlocks(5, 1000)
    shared.blocks[2000:3000] = b"x" * 1000
    peer = PeerBlocks(shared.fd, 5, 1000)
    assert bytes(peer.slab(2)) == b"x" * 1000 and not any(peer.slab(1)) and not any(peer.slab(3))
    assert peer.nonce == shared.nonce
    shared.generations[4] = 7
    assert [peer.generation(block) for block in range(5)] == [0, 0, 0, 0, 7]
    peer.close()


def test_a_peer_cannot_write_and_nobody_can_shrink() -> None:
    shared = SharedBlocks(2, 64)
    peer = PeerBlocks(shared.fd, 2, 64)
    assert peer.slab(0).readonly
    size = os.fstat(shared.fd).st_size
    with pytest.raises(PermissionError):
        mmap.mmap(shared.fd, size)
    for wrong in (0, 2 * size):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, wrong)
    with pytest.raises(PermissionError):
        os.pwrite(shared.fd, b"x", 0)
    shared.blocks[0] = 1  # its owner goes on
    assert peer.slab(0)[0] == 1
    peer.close()


def test_what_is_no_shared_pool_is_not_mapped() -> None:
    shared = SharedBlocks(2, 64)
    for num_blocks, block_bytes in ((2, 4096), (1000, 64), (0, 64), (2, -64)):
        with pytest.raises(ProtocolError):
            PeerBlocks(shared.fd, num_blocks, block_bytes)
    unsealed = os.memfd_create("test")
    os.ftruncate(unsealed, os.fstat(shared.fd).st_size)
    with pytest.raises(ProtocolError, match="seals"):
        PeerBlocks(unsealed, 2, 64)
    os.close(unsealed)
    read, write = os.pipe()
    with pytest.raises(ProtocolError, match="no sealed memory"):
        PeerBlocks(read, 2, 64)
    os.close(read)
    os.close(write)


def test_more_than_there_is() -> None:
    with pytest.raises(OSError, match=r"^cannot share [\d,]+ bytes"):
        SharedBlocks(1 << 45, 4096)


def test_the_pool_of_a_worker_is_shared_and_fenced() -> None:
    pool = KvPool(KvLayout(2, 3, 4, 16, "float32"), 4)
    assert pool.shared is not None
    peer = PeerBlocks(pool.shared.fd, 4, pool.block_bytes)
    pool.tensor[3] = 1.5
    assert bytes(peer.slab(3)) == bytes(pool.slab(3)) and any(peer.slab(3))
    blocks = BlockManager(4, pool.generations)
    assert [peer.generation(block) for block in range(4)] == [0, 0, 0, 0]
    [first] = blocks.allocate(1) or []
    blocks.release([first])
    assert peer.generation(first) == 1  # until it is taken anew
    [(slot, generation)] = blocks.reserve(1) or []
    assert (slot, generation) == (first, 2) and peer.generation(first) == 2
    peer.close()
