"""Blocks of different sizes at both ends: what is cut on the way is exactly what was sent."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from common.errors import ProtocolError
from common.messages import KvLayoutInfo
from kvtransfer import copying, protocol, shm_transport, ucx_transport
from kvtransfer.commands import Arrived, BlockRef, Broken, Delivered, Key, Offer, Ticketed, Wanted
from kvtransfer.copying import address_of, gather_blocks, library
from kvtransfer.cutting import Cutting, Piece
from kvtransfer.memory import BlockMemory, digest
from kvtransfer.outgoing import Shipment
from tests.kvtransfer.node import FIRST, PATIENT, Node, running
from tests.kvtransfer.pool import LAYOUT, BytePool
from tests.kvtransfer.raw_sender import RawShm, raw_sender

KEY = Key(7, 1)
ROWS = LAYOUT.num_layers * 2 * LAYOUT.num_kv_heads
TOKEN_BYTES = LAYOUT.head_dim * 4
SIZES = [(32, 16), (16, 32), (32, 48), (16, 64), (64, 16)]


def layout(block_size: int) -> KvLayoutInfo:
    return msgspec.structs.replace(LAYOUT, block_size=block_size)


def block_bytes(block_size: int) -> int:
    return ROWS * block_size * TOKEN_BYTES


@dataclass
class Prompt:
    """The KV of some tokens: [row, token, byte]."""

    num_tokens: int

    def __post_init__(self) -> None:
        shape = (ROWS, self.num_tokens, TOKEN_BYTES)
        self.kv = np.random.default_rng(self.num_tokens).integers(1, 256, shape, np.uint8)

    def write(self, pool: BytePool, block: int, position: int, size: int) -> None:
        part = self.kv[:, position * size : (position + 1) * size]
        rows = np.frombuffer(pool.slab(block), np.uint8).reshape(ROWS, size, TOKEN_BYTES)
        rows[:, : part.shape[1]] = part

    def check(self, pool: BytePool, block: int, position: int, size: int) -> None:
        part = self.kv[:, position * size : (position + 1) * size]
        rows = np.frombuffer(pool.slab(block), np.uint8).reshape(ROWS, size, TOKEN_BYTES)
        assert (rows[:, : part.shape[1]] == part).all(), (block, position)
        beyond = -(-part.shape[1] // 16) * 16
        assert not rows[:, beyond:].any(), (block, position)


def node(id: str, epoch: int, size: int, transport: str, num_blocks: int = 16) -> Node:
    return Node(
        id, epoch, num_blocks, block_bytes(size), PATIENT, layout(size), transport=transport
    )


def offer(p: Node, prompt: Prompt, size: int, positions: Sequence[int]) -> None:
    """Compute some blocks, which lie in reverse order in the pool, and offer them."""
    refs = []
    for position in positions:
        block = p.pool.num_blocks - 1 - position
        prompt.write(p.pool, block, position, size)
        refs.append(BlockRef(position, block, min(size, prompt.num_tokens - position * size)))
    p.endpoint.command(Offer(KEY, tuple(refs)))


@pytest.mark.parametrize(("here", "there"), SIZES)
async def test_blocks_are_cut_on_the_way(transport: str, here: int, there: int) -> None:
    prompt = Prompt(183)
    p, d = node("p", 1, here, transport), node("d", 2, there, transport)
    blocks, slots = -(-183 // here), -(-183 // there)
    async with running(p, d):
        p.open(KEY, d.peer, 183)
        assert (await d.events.next(Wanted)).num_tokens == 183
        d.grant(KEY, {i: 15 - i for i in range(1, slots)})  # D has the first one
        for position in range(blocks):
            offer(p, prompt, here, [position])
            await asyncio.sleep(0)
        p.finish(KEY)
        num_bytes = (slots - 1) * block_bytes(there)
        assert await d.events.next(Arrived) == Arrived(KEY, FIRST, num_bytes)
        assert await p.events.next(Ticketed) == Ticketed(KEY, slots - 1)
        assert await p.events.next(Delivered) == Delivered(KEY, slots - 1, num_bytes)
        for position in range(1, slots):
            prompt.check(d.pool, 15 - position, position, there)
        sent, received = p.endpoint.stats(), d.endpoint.stats()
        assert sent.bytes_sent == received.bytes_received == num_bytes
        assert sent.bytes_sent_over == {transport: num_bytes}
        assert sent.blocks_sent == received.blocks_received == slots - 1


@pytest.mark.parametrize(("here", "there"), [(32, 16), (16, 32)])
async def test_a_flipped_bit_is_found_and_sent_again(
    transport: str, here: int, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt(96)
    p, d = node("p", 1, here, transport), node("d", 2, there, transport)
    flips = iter([True])

    def parts(shipment: Shipment, memory: BlockMemory) -> list[memoryview]:
        assert shipment.staged is not None or not shipment.header.blocks
        if shipment.staged is not None and next(flips, False):
            shipment.staged[100] ^= 1
        return [] if shipment.staged is None else [shipment.staged]

    def memory_of(staged: memoryview) -> int:
        if next(flips, False):
            staged[100] ^= 1
        return ucx_memory_of(staged)

    def gather(cutting, pool, address, pieces, slabs=None):  # type: ignore[no-untyped-def]
        """The sender's pool changes between header and copy."""
        flip = next(flips, False)
        at = pieces[0].block * cutting.source_bytes + pieces[0].unit * cutting.piece_bytes + 3
        shared = (p.stage or p.pool).shared
        assert shared is not None
        shared.blocks[at] ^= flip
        digests = gather_blocks(cutting, pool, address, pieces, slabs)
        shared.blocks[at] ^= flip
        return digests

    ucx_memory_of = ucx_transport.memory_of
    monkeypatch.setattr(Shipment, "parts", parts)
    monkeypatch.setattr(ucx_transport, "memory_of", memory_of)
    monkeypatch.setattr(shm_transport, "gather_blocks", gather)
    async with running(p, d):
        p.open(KEY, d.peer, 96)
        await d.events.next(Wanted)
        d.grant(KEY, {i: i for i in range(96 // there)})
        offer(p, prompt, here, range(96 // here))
        p.finish(KEY)
        await d.events.next(Arrived)
        assert next(flips, None) is None
        stats = d.endpoint.stats()
        assert (stats.digest_errors, stats.rounds_repeated) == (1, 1)
        for position in range(96 // there):
            prompt.check(d.pool, position, position, there)


async def test_a_source_that_is_used_anew_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = Prompt(64)
    p, d = node("p", 1, 16, "shm"), node("d", 2, 32, "shm")
    first = iter([True])

    def gather(cutting, pool, address, pieces, slabs=None):  # type: ignore[no-untyped-def]
        digests = gather_blocks(cutting, pool, address, pieces, slabs)
        if next(first, False):
            p.pool.raise_generation(pieces[1].block)
        return digests

    monkeypatch.setattr(shm_transport, "gather_blocks", gather)
    async with running(p, d):
        p.open(KEY, d.peer, 64)
        await d.events.next(Wanted)
        d.grant(KEY, {0: 0, 1: 1})
        offer(p, prompt, 16, range(4))
        p.finish(KEY)
        await d.events.next(Arrived)
        stats = d.endpoint.stats()
        assert (stats.dropped["incomplete"], stats.rounds_repeated) == (1, 1)
        for position in (0, 1):
            prompt.check(d.pool, position, position, 32)


async def test_sources_outside_of_the_pool() -> None:
    d = Node("d", 2, 16, block_bytes(16), PATIENT, layout(16), transport="shm")
    async with running(d):
        with raw_sender(d) as raw:
            raw.data.close()
            raw.data = RawShm(block_bytes(32), 32)
            ticket = await raw.ticket(KEY, 11, {0: 8, 1: 9})
            contents = [bytes(block_bytes(16))] * 2
            header = raw.header(ticket, contents)
            for block, unit in ((8, 0), (-2, 0), (0, 2), (0, -1)):
                sources = (protocol.SharedBlock(0, 0, 1), protocol.SharedBlock(block, 0, unit))
                raw.data.send(protocol.SharedHeader(header, sources))
            raw.data.send(protocol.SharedHeader(header, (protocol.SharedBlock(0, 0, 1),)))
            while d.endpoint.stats().dropped["malformed"] < 5:
                await asyncio.sleep(0.001)
            sources = (protocol.SharedBlock(7, 0, 1), protocol.SharedBlock(-1, 0))
            raw.data.send(protocol.SharedHeader(header, sources))
            await raw.close(ticket)
            await d.events.next(Arrived)


async def test_a_header_of_another_shape_is_dropped(transport: str) -> None:
    d = Node("d", 2, transport=transport)
    async with running(d):
        with raw_sender(d) as raw:
            ticket = await raw.ticket(KEY, 11, {0: 8})
            assert ticket.slots[0].block == 8
            content = bytes(range(64))
            right = raw.header(ticket, [content])
            for field, value in (("block_size", 32), ("num_heads", 1), ("first_head", 1),
                                 ("dtype", "bfloat16")):  # fmt: skip
                wire = msgspec.structs.replace(right.wire, **{field: value})
                await raw.ship(msgspec.structs.replace(right, wire=wire), [content])
            while d.endpoint.stats().dropped["wire"] < 4:
                await asyncio.sleep(0.001)
            assert not any(d.pool.slab(8))
            await raw.ship(right, [content])
            await raw.close(ticket)
            await d.events.next(Arrived)


async def test_sizes_that_cannot_be_cut_are_refused() -> None:
    p, d = Node("p", 1, layout=layout(24)), Node("d", 2)
    async with running(p, d):
        p.open(KEY, d.peer, 24)
        detail = "layout: block size 24 of the sender is no multiple of 16"
        assert await p.events.next(Broken) == Broken(KEY, "refused", detail)


def test_what_cannot_be_cut() -> None:
    own = protocol.Wire.of(LAYOUT)
    for change in ({"block_size": 24}, {"block_size": 0}, {"block_size": 1 << 20},
                   {"first_head": 1}, {"num_heads": 1}, {"dtype": "float8"}):  # fmt: skip
        with pytest.raises(ProtocolError):
            Cutting.of(LAYOUT, block_bytes(16), msgspec.structs.replace(own, **change))
    with pytest.raises(ProtocolError, match="cannot be cut"):
        Cutting.of(LAYOUT, 1001, msgspec.structs.replace(own, block_size=32))
    assert Cutting.of(LAYOUT, 1001, own).is_whole


@pytest.mark.parametrize("way", ["native", "plain"])
@pytest.mark.parametrize(("here", "there"), SIZES)
def test_gathers_and_digests_in_one_pass(
    way: str, here: int, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "plain":
        monkeypatch.setattr(copying, "library", lambda: None)
    elif library() is None:
        pytest.skip("needs a C++ compiler")
    prompt = Prompt(-(-here * there // 32) * 16 * 2 // 16)
    wire = protocol.Wire.of(layout(there))
    cutting = Cutting.of(layout(here), block_bytes(here), wire)
    assert cutting.block_bytes == block_bytes(there)
    source, target = BytePool(32, block_bytes(here)), BytePool(32, block_bytes(there))
    for position in range(-(-prompt.num_tokens // here)):
        prompt.write(source, 31 - position, position, here)
    count = cutting.num_blocks(prompt.num_tokens)
    pieces = []
    for position in range(count):
        found = cutting.sources(position, prompt.num_tokens)
        pieces += [Piece(31 - at, unit) for at, unit in found]
        pieces += [Piece(-1, 0)] * (cutting.pieces - len(found))
    slabs: list[memoryview | None] = [target.slab(i) for i in range(count)]
    base = address_of(source.slab(0))
    digests = gather_blocks(cutting, source.slab, base, pieces, slabs)
    for position in range(count):
        prompt.check(target, position, position, there)
    assert digests == [digest(target.slab(i)) for i in range(count)]
    assert gather_blocks(cutting, source.slab, base, pieces) == digests
    target.slab(0)[:] = bytes(target.block_bytes)
    slabs[0] = None
    assert gather_blocks(cutting, source.slab, base, pieces, slabs) == [None, *digests[1:]]
    assert not any(target.slab(0))
