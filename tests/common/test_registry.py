"""A worker's registration in a real Redis: what is written, when, and after every outage."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from common.blockhash import BlockHash, chain, pack_tokens, seed
from common.errors import ConfigError, ProtocolError
from common.holdings import Holdings
from common.messages import WorkerInfo
from common.records import (
    EVENT_HASHES,
    Changed,
    Digest,
    Event,
    Joined,
    Keys,
    Left,
    Snapshot,
    StreamId,
    decode_event,
    decode_info,
    decode_snapshot,
    encode_info,
    unpack_hashes,
    xor_hashes,
)
from common.redis_client import check_redis, open_redis
from common.registry import Pace, Registration
from tests.redis_server import RedisServer
from tests.worker_info import worker_info

pytestmark = pytest.mark.redis

PACE = Pace(flush_s=0.02, digest_s=0.1, snapshot_s=0.2)
KEYS = Keys("test")
INFO = worker_info("w")


def hashes(n: int, name: int = 0) -> list[BlockHash]:
    return chain(pack_tokens([name] * 16 * n), seed("c"))


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = open_redis(redis_server.url)
    yield client
    await client.aclose()


@asynccontextmanager
async def registered(
    url: str, info: WorkerInfo = INFO, pace: Pace = PACE, ttl_s: float = 10.0
) -> AsyncIterator[Registration]:
    registration = Registration(url, "test", ttl_s, info, pace)
    task = asyncio.create_task(registration.run())
    try:
        yield registration
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await check():
            await asyncio.sleep(0.01)


async def events(redis: Redis) -> list[Event]:
    entries: Any = await redis.xrange(KEYS.events)
    return [decode_event(fields) for _, fields in entries]


async def shown(redis: Redis) -> WorkerInfo | None:
    fields: Any = await redis.hgetall(KEYS.worker("w"))
    return decode_info(fields) if fields else None


async def snapshot(redis: Redis, epoch: int = 1) -> Snapshot | None:
    data = await redis.get(KEYS.blocks("w", epoch))
    return decode_snapshot(data) if isinstance(data, bytes) else None


async def snapshot_holds(redis: Redis, wanted: list[BlockHash], epoch: int = 1) -> bool:
    found = await snapshot(redis, epoch)
    return found is not None and set(unpack_hashes(found.hashes)) == set(wanted)


def replayed(all_events: list[Event]) -> set[BlockHash]:
    """The blocks after all Changed events, which must be numbered without a gap."""
    held: set[BlockHash] = set()
    seq = 1
    for event in all_events:
        if isinstance(event, Changed):
            seq += 1
            assert event.seq == seq
            assert len(event.stored) + len(event.evicted) <= EVENT_HASHES * 16
            held |= set(unpack_hashes(event.stored))
            held -= set(unpack_hashes(event.evicted))
        elif isinstance(event, Digest):
            assert event.seq == seq
            assert (event.count, int.from_bytes(event.xor, "little")) == (
                len(held),
                xor_hashes(held),
            )
    return held


async def test_a_worker_registers_and_leaves_nothing_behind(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with registered(redis_server.url) as registration:
        await until(lambda: _not_none(shown(redis)))
        assert await shown(redis) == INFO
        assert await redis.smembers(KEYS.workers) == {b"w"}
        assert await snapshot(redis) == Snapshot(1, "0-0", b"")
        assert (await events(redis))[:2] == [Joined("w", 1), Digest("w", 1, 1, 0, bytes(16))]
        assert 9_000 < await redis.pttl(KEYS.worker("w")) <= 10_000
        assert 50_000 < await redis.pttl(KEYS.blocks("w", 1)) <= 60_000
        await registration.leave()
        assert (await events(redis))[-1] == Left("w", 1)
        assert await redis.keys("*") == [KEYS.events.encode()]
        assert 0 < await redis.ttl(KEYS.events) <= 3_600


async def _not_none(value: Awaitable[object]) -> bool:
    return await value is not None


async def test_leave_after_the_end_of_run(redis_server: RedisServer, redis: Redis) -> None:
    async with registered(redis_server.url) as registration:
        await until(lambda: _not_none(shown(redis)))
    assert await shown(redis) == INFO
    await registration.leave()
    assert await redis.keys("*") == [KEYS.events.encode()]


async def test_events_tell_every_change_once(redis_server: RedisServer, redis: Redis) -> None:
    async with registered(redis_server.url) as registration:
        await until(lambda: _not_none(shown(redis)))
        registration.publish(hashes(3), [])
        await until(lambda: snapshot_holds(redis, hashes(3)))
        registration.publish(hashes(3) + hashes(2, 1), hashes(3)[1:] + hashes(1, 7))
        await until(lambda: snapshot_holds(redis, hashes(1) + hashes(2, 1)))
        assert replayed(await events(redis)) == {*hashes(1), *hashes(2, 1)}


async def test_many_hashes_make_many_events(redis_server: RedisServer, redis: Redis) -> None:
    async with registered(redis_server.url) as registration:
        await until(lambda: _not_none(shown(redis)))
        registration.publish(hashes(3 * EVENT_HASHES + 1), [])
        await until(lambda: snapshot_holds(redis, hashes(3 * EVENT_HASHES + 1)))
        changed = [e for e in await events(redis) if isinstance(e, Changed)]
        assert [len(e.stored) // 16 for e in changed] == [EVENT_HASHES] * 3 + [1]
        assert replayed(await events(redis)) == set(hashes(3 * EVENT_HASHES + 1))


async def test_what_comes_and_goes_between_two_events_is_not_told(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with registered(redis_server.url) as registration:
        await until(lambda: _not_none(shown(redis)))
        registration.publish(hashes(2), [])
        registration.publish([], hashes(2))
        registration.publish(hashes(1, 5), [])
        await until(lambda: snapshot_holds(redis, hashes(1, 5)))
        changed = [e for e in await events(redis) if isinstance(e, Changed)]
        assert changed == [Changed("w", 1, 2, hashes(1, 5)[0], b"")]


async def test_the_snapshot_is_rewritten_only_after_changes_and_not_often(
    redis_server: RedisServer, redis: Redis
) -> None:
    pace = Pace(flush_s=0.01, digest_s=60, snapshot_s=0.5)
    async with registered(redis_server.url, pace=pace) as registration:
        start = time.monotonic()
        await until(lambda: snapshot_holds(redis, []))
        for n in range(1, 6):
            registration.publish(hashes(n), [])
            await asyncio.sleep(0.02)
        await until(lambda: snapshot_holds(redis, hashes(5)))
        assert time.monotonic() - start > 0.4
        last = await snapshot(redis)
        assert last is not None
        entries: Any = await redis.xrange(KEYS.events)
        ids = [StreamId.parse(id) for id, _ in entries]
        assert StreamId.parse(last.stream_id) in ids
        assert last.seq == 1 + sum(isinstance(e, Changed) for e in await events(redis))


async def test_a_state_is_shown_at_once(redis_server: RedisServer, redis: Redis) -> None:
    async with registered(redis_server.url) as registration:
        await until(lambda: _not_none(shown(redis)))
        registration.set_state("draining")
        draining = msgspec.structs.replace(INFO, state="draining")
        await until(lambda: _equal(shown(redis), draining))
        joined = [e for e in await events(redis) if isinstance(e, Joined)]
        assert joined == [Joined("w", 1)] * 2


async def _equal(value: Awaitable[object], wanted: object) -> bool:
    return await value == wanted


async def test_a_new_epoch_begins_with_its_own_blocks(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with registered(redis_server.url) as registration:
        registration.publish(hashes(5), [])
        await until(lambda: snapshot_holds(redis, hashes(5)))
        registration.replace(worker_info("w", epoch=2), hashes(2))
        await until(lambda: snapshot_holds(redis, hashes(2), epoch=2))
        assert await snapshot(redis, epoch=1) is None
        assert await shown(redis) == worker_info("w", epoch=2)
        assert Joined("w", 2) in await events(redis)


async def test_it_registers_when_redis_comes_up(redis_server: RedisServer, redis: Redis) -> None:
    redis_server.kill()
    async with registered(redis_server.url) as registration:
        registration.publish(hashes(4), [])
        await asyncio.sleep(0.2)
        redis_server.start()
        await until(lambda: snapshot_holds(redis, hashes(4)))
        assert await shown(redis) == INFO


async def test_after_an_outage_everything_is_announced_anew(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with registered(redis_server.url) as registration:
        registration.publish(hashes(4), [])
        await until(lambda: snapshot_holds(redis, hashes(4)))
        redis_server.kill()
        for n in range(10, 60):
            registration.publish(hashes(3, n), hashes(3, n - 1))
            await asyncio.sleep(0)
        redis_server.start()
        await until(lambda: snapshot_holds(redis, hashes(4) + hashes(3, 59)))
        await until(lambda: _equal(shown(redis), INFO))
        digests = [e for e in await events(redis) if isinstance(e, Digest)]
        assert {digest.count for digest in digests} == {7}


async def test_an_emptied_redis_is_filled_again(redis_server: RedisServer, redis: Redis) -> None:
    async with registered(redis_server.url) as registration:
        registration.publish(hashes(4), [])
        await until(lambda: snapshot_holds(redis, hashes(4)))
        await redis.flushall()
        await until(lambda: _equal(shown(redis), INFO))
        await until(lambda: snapshot_holds(redis, hashes(4)))
        assert await redis.smembers(KEYS.workers) == {b"w"}


async def test_the_entry_is_renewed_and_expires_with_the_worker(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with registered(redis_server.url, ttl_s=0.9):
        await until(lambda: _not_none(shown(redis)))
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert await shown(redis) == INFO
            await asyncio.sleep(0.02)
    await until(lambda: _equal(shown(redis), None))


async def test_leaving_an_unreachable_redis_raises_nothing(redis_server: RedisServer) -> None:
    async with registered(redis_server.url) as registration:
        redis_server.kill()
        await asyncio.wait_for(registration.leave(), 5)


async def test_check_redis(redis_server: RedisServer) -> None:
    await check_redis(redis_server.url)
    redis_server.kill()
    with pytest.raises(ConfigError, match="does not answer"):
        await check_redis(redis_server.url)
    with pytest.raises(ConfigError, match="bad Redis URL"):
        await check_redis("nonsense")


def test_bad_records_are_protocol_errors() -> None:
    assert decode_info({k.encode(): v for k, v in encode_info(INFO).items()}) == INFO
    for fields in ({b"id": b"{"}, {b"id": b'"w"'}, {b"\xff": b"1"}):
        with pytest.raises(ProtocolError):
            decode_info(fields)
    for entry in ({}, {b"e": b"\xc1"}, {b"e": msgspec.msgpack.encode({"type": "other"})}):
        with pytest.raises(ProtocolError):
            decode_event(entry)
    with pytest.raises(ProtocolError):
        decode_snapshot(b"\xc1")
    with pytest.raises(ProtocolError):
        unpack_hashes(bytes(17))
    with pytest.raises(ProtocolError):
        StreamId.parse("tomorrow")


def test_holdings_cancel_what_nobody_was_told() -> None:
    holdings = Holdings("w", 1)
    a, b, c = hashes(3)
    holdings.note([a, b], [])
    holdings.note([c], [a])
    assert holdings.take_changes() == [Changed("w", 1, 1, b + c, b"")]
    holdings.note([a], [b])
    holdings.note([b], [])
    assert holdings.take_changes() == [Changed("w", 1, 2, a, b"")]
    assert holdings.take_changes() == []
    assert holdings.digest().count == 3
    assert set(unpack_hashes(holdings.snapshot("5-1").hashes)) == {a, b, c}
    holdings.note([], [a])
    holdings.skip()
    assert (holdings.seq, holdings.num_pending, holdings.digest().count) == (3, 0, 2)
