"""A router's directory and the workers' registrations, joined by a real Redis that fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest
from redis.asyncio import Redis

from common.blockhash import BlockHash, chain, pack_tokens, seed
from common.messages import WorkerInfo
from common.records import Changed, Digest, Joined, Keys, Snapshot, encode_info
from common.redis_client import open_redis
from common.registry import Pace, Registration
from router.directory import Directory
from tests.redis_server import RedisServer
from tests.worker_info import worker_info

pytestmark = pytest.mark.redis

PACE = Pace(flush_s=0.02, digest_s=0.1, snapshot_s=0.2)
KEYS = Keys("test")
CHAIN = chain(pack_tokens(range(16 * 40)), seed("c0"))
OTHER = chain(pack_tokens(range(7, 7 + 16 * 40)), seed("c0"))


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = open_redis(redis_server.url)
    yield client
    await client.aclose()


@asynccontextmanager
async def registered(
    url: str, info: WorkerInfo, pace: Pace = PACE, ttl_s: float = 10.0
) -> AsyncIterator[Registration]:
    registration = Registration(url, "test", ttl_s, info, pace)
    task = asyncio.create_task(registration.run())
    try:
        yield registration
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def followed(url: str, grace_s: float = 1.0) -> AsyncIterator[Directory]:
    directory = Directory(url, "test", refresh_s=0.1, grace_s=grace_s)
    task = asyncio.create_task(directory.run())
    try:
        yield directory
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.005)


def found(directory: Directory, hashes: list[BlockHash] = CHAIN) -> dict[str, int]:
    return directory.matches("c0", 16, hashes)


async def test_announce_look_up_and_evict(redis_server: RedisServer) -> None:
    url = redis_server.url
    async with followed(url) as directory, registered(url, worker_info("a")) as a:
        async with registered(url, worker_info("b")) as b:
            await until(lambda: len(directory.workers) == 2)
            assert directory.workers == {"a": worker_info("a"), "b": worker_info("b")}
            a.publish(CHAIN[:30], [])
            b.publish(CHAIN[:12] + OTHER, [])
            await until(lambda: found(directory) == {"a": 30, "b": 12})
            assert found(directory, OTHER) == {"b": 40}
            assert found(directory, CHAIN[:20]) == {"a": 20, "b": 12}
            assert directory.matches("c1", 16, CHAIN) == {}
            assert directory.matches("c0", 32, CHAIN) == {}
            a.publish([], CHAIN[5:])
            b.publish([], CHAIN)
            await until(lambda: found(directory) == {"a": 5})
            assert found(directory, OTHER) == {"b": 40}


async def test_a_late_router_reads_snapshots_and_goes_on(redis_server: RedisServer) -> None:
    url = redis_server.url
    async with registered(url, worker_info("a")) as a, followed(url) as first:
        a.publish(CHAIN[:30], [])
        await until(lambda: found(first) == {"a": 30})
        a.publish([], CHAIN[20:])
        a.publish(OTHER[:5], [])
        async with followed(url) as late:
            await until(lambda: found(late) == {"a": 20})
            await until(lambda: found(late, OTHER) == {"a": 5})
            a.publish(OTHER[:9], [])
            await until(lambda: found(late, OTHER) == {"a": 9})
            assert late.malformed == 0


async def test_a_late_router_joins_an_old_snapshot_with_the_stream(
    redis_server: RedisServer,
) -> None:
    url = redis_server.url
    pace = Pace(flush_s=0.01, digest_s=0.1, snapshot_s=3_600)
    async with registered(url, worker_info("a"), pace) as a, followed(url) as first:
        await until(lambda: "a" in first.workers)
        for n in range(1, 41):
            a.publish(CHAIN[n - 1 : n], [])
            await until(lambda n=n: found(first) == {"a": n})  # type: ignore[misc]
        a.publish([], CHAIN[30:])
        await until(lambda: found(first) == {"a": 30})
        async with followed(url) as late:
            await until(lambda: late.snapshots == 1)
            assert found(late) == {"a": 30}
            await asyncio.sleep(3 * pace.digest_s)
            assert (late.snapshots, late.gaps) == (1, 0)


async def test_a_block_that_spans_units_has_its_own_class(redis_server: RedisServer) -> None:
    url = redis_server.url
    wide = chain(pack_tokens(range(16 * 40)), seed("c0"), units_per_block=2)
    async with followed(url) as directory:
        async with registered(url, worker_info("a")) as a:
            async with registered(url, worker_info("b", block_size=32)) as b:
                a.publish(CHAIN[:3], [])
                b.publish(wide[:3], [])
                await until(lambda: found(directory) == {"a": 3})
                await until(lambda: directory.matches("c0", 32, wide) == {"b": 3})


async def test_a_router_that_is_slower_than_the_stream_is_short(
    redis_server: RedisServer, redis: Redis
) -> None:
    url = redis_server.url
    directory = Directory(url, "test", refresh_s=0.1)
    async with registered(url, worker_info("a")) as a:
        a.publish(CHAIN[:10], [])
        task = asyncio.create_task(directory.run())
        await until(lambda: found(directory) == {"a": 10} and directory.snapshots == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        a.publish(CHAIN[10:20], CHAIN[:1])
        a.publish(CHAIN[:1], [])
        length = await redis.xlen(KEYS.events)
        async with asyncio.timeout(5):
            while await redis.xlen(KEYS.events) < length + 2:
                await asyncio.sleep(0.01)
        await redis.xtrim(KEYS.events, maxlen=0, approximate=False)
        task = asyncio.create_task(directory.run())
        await until(lambda: found(directory) == {"a": 20})
        assert directory.gaps == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_number_from_nowhere_does_not_stop_the_rest(
    redis_server: RedisServer, redis: Redis
) -> None:
    url = redis_server.url
    async with registered(url, worker_info("a")) as a, followed(url) as directory:
        a.publish(CHAIN[:10], [])
        await until(lambda: found(directory) == {"a": 10} and directory.snapshots == 1)
        forged = msgspec.msgpack.encode(Digest("a", 1, 1 << 60, 0, bytes(16)))
        await redis.xadd(KEYS.events, {"e": forged})
        a.publish(OTHER[:7], CHAIN[5:])
        await until(lambda: found(directory) == {"a": 5})
        await until(lambda: found(directory, OTHER) == {"a": 7})
        assert directory.gaps == 1


async def test_a_trimmed_stream_is_healed_by_the_snapshot(
    redis_server: RedisServer, redis: Redis
) -> None:
    """Written by hand, so that exactly the events 2 and 3 are lost."""
    info = worker_info("a")

    async def add(event: Changed | Digest | Joined) -> None:
        await redis.xadd(KEYS.events, {"e": msgspec.msgpack.encode(event)})

    async def store(seq: int, hashes: list[BlockHash]) -> None:
        snapshot = msgspec.msgpack.encode(Snapshot(seq, "0-0", b"".join(hashes)))
        await redis.set(KEYS.blocks("a", 1), snapshot)

    for name, value in encode_info(info).items():
        await redis.hset(KEYS.worker("a"), name, value)
    await redis.sadd(KEYS.workers, "a")
    await store(0, [])
    async with followed(redis_server.url) as directory:
        await until(lambda: directory.snapshots == 1)
        await add(Changed("a", 1, 1, b"".join(CHAIN[:10]), b""))
        await until(lambda: found(directory) == {"a": 10})
        await add(Changed("a", 1, 4, b"".join(CHAIN[12:14]), b""))
        await until(lambda: directory.gaps == 1)
        assert found(directory) == {"a": 10}
        await store(3, CHAIN[:12])
        await until(lambda: found(directory) == {"a": 14})
        assert directory.snapshots == 2
        # A digest that does not fit is as good as a gap.
        await store(5, CHAIN[:3])
        await add(Digest("a", 1, 5, 3, b"".join(CHAIN[:1])))
        await until(lambda: found(directory) == {"a": 3})
        await add(Digest("a", 1, 5, 2, CHAIN[0]))
        await until(lambda: directory.gaps == 3)


async def test_a_killed_redis_that_comes_back_empty(redis_server: RedisServer) -> None:
    url = redis_server.url
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(registered(url, worker_info("a")))
        b = await stack.enter_async_context(registered(url, worker_info("b")))
        directory = await stack.enter_async_context(followed(url))
        a.publish(CHAIN[:10], [])
        b.publish(CHAIN[:20], [])
        await until(lambda: found(directory) == {"a": 10, "b": 20})
        redis_server.kill()
        a.publish(CHAIN[10:25], [])
        b.publish([], CHAIN[4:])
        for _ in range(30):  # nobody expires, look-ups go on
            await asyncio.sleep(0.05)
            assert found(directory) == {"a": 10, "b": 20}
            assert set(directory.workers) == {"a", "b"}
        redis_server.start()
        await until(lambda: found(directory) == {"a": 25, "b": 4})
        async with followed(url) as late:
            await until(lambda: found(late) == {"a": 25, "b": 4})
        a.publish(OTHER, [])
        await until(lambda: found(directory, OTHER) == {"a": 40})


async def test_a_redis_that_is_stopped_for_two_seconds_loses_nothing(
    redis_server: RedisServer,
) -> None:
    url = redis_server.url
    async with registered(url, worker_info("a")) as a, followed(url) as directory:
        a.publish(CHAIN[:10], [])
        await until(lambda: found(directory) == {"a": 10})
        changes = 0

        async def count() -> None:
            nonlocal changes
            while True:
                await directory.changed()
                changes += 1

        counting = asyncio.create_task(count())
        await until(lambda: changes == 1)
        redis_server.pause()
        for n in range(10, 40):
            a.publish(CHAIN[n : n + 1], [])
            await asyncio.sleep(2.0 / 30)
            assert found(directory) == {"a": 10}
        redis_server.resume()
        await until(lambda: found(directory) == {"a": 40})
        counting.cancel()
        assert changes == 1
        assert set(directory.workers) == {"a"}


async def test_an_emptied_redis_drops_nobody(redis_server: RedisServer, redis: Redis) -> None:
    url = redis_server.url
    async with registered(url, worker_info("a")) as a, followed(url, 5.0) as directory:
        a.publish(CHAIN[:10], [])
        await until(lambda: found(directory) == {"a": 10})
        await redis.flushall()
        a.publish(CHAIN[10:20], [])
        await until(lambda: found(directory) == {"a": 20})
        assert set(directory.workers) == {"a"}
        async with followed(url) as late:
            await until(lambda: found(late) == {"a": 20})


async def test_a_worker_whose_entry_expired_is_dropped_with_its_blocks(
    redis_server: RedisServer, redis: Redis
) -> None:
    url = redis_server.url
    async with followed(url, grace_s=0.3) as directory:
        async with registered(url, worker_info("a"), ttl_s=0.5) as a:
            a.publish(CHAIN[:10], [])
            await until(lambda: found(directory) == {"a": 10})
            await asyncio.wait_for(directory.changed(), 5)
        await asyncio.wait_for(directory.changed(), 5)
        assert directory.workers == {}
        assert found(directory) == {}
        async with asyncio.timeout(5):
            while await redis.smembers(KEYS.workers):
                await asyncio.sleep(0.01)


async def test_a_worker_that_leaves_is_dropped_at_once(redis_server: RedisServer) -> None:
    url = redis_server.url
    async with followed(url, grace_s=3_600) as directory:
        async with registered(url, worker_info("a")) as a:
            a.publish(CHAIN[:10], [])
            await until(lambda: found(directory) == {"a": 10})
            a.set_state("draining")
            await until(lambda: directory.workers["a"].state == "draining")
            assert found(directory) == {"a": 10}
            await a.leave()
            await until(lambda: not directory.workers)
            assert found(directory) == {}


async def test_a_new_epoch_drops_the_old_holdings(redis_server: RedisServer) -> None:
    url = redis_server.url
    async with registered(url, worker_info("a")) as a, followed(url) as directory:
        a.publish(CHAIN[:10], [])
        await until(lambda: found(directory) == {"a": 10})
        a.replace(worker_info("a", epoch=2), OTHER[:3])
        await until(lambda: found(directory, OTHER) == {"a": 3})
        assert directory.workers["a"].epoch == 2
        assert found(directory) == {}
        a.publish(CHAIN[:2], [])
        await until(lambda: found(directory) == {"a": 2})


async def test_a_restarted_worker_has_nothing_of_its_former_life(
    redis_server: RedisServer,
) -> None:
    url = redis_server.url
    async with followed(url) as directory:
        async with registered(url, worker_info("a")) as a:
            a.publish(CHAIN[:10], [])
            await until(lambda: found(directory) == {"a": 10})
        async with registered(url, worker_info("a", epoch=2)) as again:
            await until(lambda: directory.workers["a"].epoch == 2)
            assert found(directory) == {}
            again.publish(CHAIN[:4], [])
            await until(lambda: found(directory) == {"a": 4})


async def test_a_forgotten_worker_counts_again_when_it_says_something(
    redis_server: RedisServer,
) -> None:
    url = redis_server.url
    async with followed(url, grace_s=3_600) as directory:
        async with registered(url, worker_info("a")) as a:
            a.publish(CHAIN[:10], [])
            await until(lambda: found(directory) == {"a": 10})
            directory.forget("a")
            assert found(directory) == {}
            await until(lambda: found(directory) == {"a": 10})
        directory.forget("a")
        directory.forget("nobody")
        with pytest.raises(TimeoutError):
            await until(lambda: found(directory) != {}, timeout_s=0.4)
        assert set(directory.workers) == {"a"}


async def test_garbage_in_redis_is_counted_and_harms_nobody(
    redis_server: RedisServer, redis: Redis
) -> None:
    url = redis_server.url
    await redis.sadd(KEYS.workers, "bad", "liar", b"\xff")
    await redis.hset(KEYS.worker("bad"), "id", "{")
    for name, value in encode_info(worker_info("truth")).items():
        await redis.hset(KEYS.worker("liar"), name, value)
    await redis.set(KEYS.blocks("a", 1), b"\xc1")
    async with followed(url) as directory, registered(url, worker_info("a")) as a:
        await until(lambda: "a" in directory.workers)
        await redis.xadd(KEYS.events, {"e": b"\xc1"})
        await redis.xadd(KEYS.events, {"other": b""})
        broken = Changed("a", 1, 5, b"123", b"")
        await redis.xadd(KEYS.events, {"e": msgspec.msgpack.encode(broken)})
        a.publish(CHAIN[:10], [])
        await until(lambda: found(directory) == {"a": 10})
        await until(lambda: directory.malformed >= 5)
        assert set(directory.workers) == {"a"}


async def test_a_router_that_starts_without_redis(redis_server: RedisServer) -> None:
    url = redis_server.url
    redis_server.kill()
    async with followed(url) as directory, registered(url, worker_info("a")) as a:
        a.publish(CHAIN[:10], [])
        await asyncio.sleep(0.1)
        assert found(directory) == {}
        redis_server.start()
        await until(lambda: found(directory) == {"a": 10})
