"""Several routers over one set of workers: what each has in flight counts for all of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from common.records import Keys
from common.redis_client import open_redis
from router.fleet import FULL, NOTHING, Carried, Fleet
from router.inflight import Inflight
from router.request import Attempt
from tests.client import complete
from tests.redis_server import RedisServer
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected
from tests.worker_info import worker_info

pytestmark = pytest.mark.redis
KEYS = Keys("test")
PROMPT = list(range(10, 60))


def fleet() -> Fleet:
    result = Fleet()
    result.up(worker_info("p", role="prefill"))
    result.up(worker_info("d", role="decode"))
    return result


def attempt(number: int) -> Attempt:
    return Attempt(
        number=number, choices=(0, 1), prefill="p", decode="d", prefill_tokens=30, kv_tokens=50,
        first=True,
    )  # fmt: skip


@asynccontextmanager
async def shared(server: RedisServer, name: str, load: Fleet) -> AsyncIterator[Inflight]:
    inflight = Inflight(server.url, "test", name, load)
    task = asyncio.create_task(inflight.run())
    yield inflight
    assert not task.done(), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = open_redis(redis_server.url)
    yield client
    await client.aclose()


async def test_what_one_router_places_counts_for_the_others(redis_server: RedisServer) -> None:
    ours, theirs = fleet(), fleet()
    async with shared(redis_server, "a", ours):
        async with shared(redis_server, "b", theirs):
            one, two = attempt(1), attempt(2)
            theirs.reserve(one)
            theirs.reserve(two)
            await until(lambda: ours["d"].kv_tokens.others == 100)
            assert ours["p"].candidate(0.0).prefill_tokens == 60
            assert ours["d"].candidate(0.0).num_seqs == 4
            ours.reserve(attempt(1))
            assert ours["d"].candidate(0.0).num_seqs == 6
            await until(lambda: theirs["d"].num_seqs.others == 2)
            theirs.release(two)
            await until(lambda: ours["d"].kv_tokens.others == 50)
        # A router that leaves takes its load along.
        await until(lambda: ours["d"].kv_tokens.others == 0)


async def test_a_router_that_died_stops_counting(redis_server: RedisServer, redis: Redis) -> None:
    ours = fleet()
    async with shared(redis_server, "a", ours):
        # As it would have left it, had it been killed: a load that expires, and its name.
        dead = Inflight(redis_server.url, "test", "dead", theirs := fleet())
        theirs.reserve(attempt(1))
        await dead._exchange()
        await until(lambda: ours["d"].kv_tokens.others == 50)
        assert 0 < await redis.pttl(KEYS.inflight("dead")) <= 3_000
        await until(lambda: ours["d"].kv_tokens.others == 0)
        members = await redis.smembers(KEYS.routers)
        while members != {b"a"}:
            await asyncio.sleep(0.01)
            members = await redis.smembers(KEYS.routers)
        await dead._client.aclose()


async def test_nonsense_in_redis_is_counted(redis_server: RedisServer, redis: Redis) -> None:
    ours = fleet()
    async with shared(redis_server, "a", ours) as inflight:
        await redis.hset(KEYS.inflight("odd"), "d", b"\xff")
        await redis.sadd(KEYS.routers, "odd")
        await until(lambda: inflight.malformed > 0)
        assert ours["d"].kv_tokens.others == 0


async def test_redis_away_means_own_load_only(redis_server: RedisServer) -> None:
    ours, theirs = fleet(), fleet()
    async with shared(redis_server, "a", ours), shared(redis_server, "b", theirs):
        theirs.reserve(attempt(1))
        await until(lambda: ours["d"].kv_tokens.others == 50)
        redis_server.kill()
        await until(lambda: ours["d"].kv_tokens.others == 0)
        redis_server.start()
        await until(lambda: ours["d"].kv_tokens.others == 50)


async def test_two_routers_do_not_herd(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=2, name="a") as one:
        for worker in one.decodes:
            worker.gate.clear()
        async with deploy(prefill=0, decode=0, name="b", namespace=one.namespace) as two:
            await until(lambda: len([*two.service.fleet]) == 2)
            asked = [asyncio.create_task(complete(one.http, PROMPT, seed=1))]
            await until(lambda: one.service.num_live == 1)
            (first,) = [m.info.id for m in one.service.fleet if m.carried != NOTHING]
            await until(lambda: two.service.fleet[first].num_seqs.others == 1)
            asked.append(asyncio.create_task(complete(two.http, PROMPT, seed=1)))
            await until(lambda: two.service.num_live == 1)
            (second,) = [m.info.id for m in two.service.fleet if m.carried != NOTHING]
            assert {first, second} == {"decode-0", "decode-1"}
            for worker in one.decodes:
                worker.go_on()
            for answer in asked:
                assert (await answer).ids == expected(PROMPT, 16, seed=1)


async def test_a_router_with_a_backlog_does_not_starve_another(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=0, name="a") as one:
        worker = await one.add("decode", "small", max_num_seqs=1)
        worker.gate.clear()
        async with deploy(prefill=0, decode=0, name="b", namespace=one.namespace) as two:
            await until(lambda: "small" in two.service.fleet)
            asked = [
                asyncio.create_task(complete(one.http, PROMPT, seed=seed))
                for seed in range(FULL + 2)
            ]
            await until(lambda: one.value("waiting_requests") == 2)
            member = two.service.fleet["small"]
            await until(lambda: member.num_seqs.others == FULL)
            mine = asyncio.create_task(complete(two.http, PROMPT, seed=9))
            await until(lambda: member.num_seqs.own == 1)
            # That is its part: what comes then waits there too.
            asked.append(asyncio.create_task(complete(two.http, PROMPT, seed=8)))
            await until(lambda: two.value("waiting_requests") == 1)
            worker.go_on()
            assert (await mine).ids == expected(PROMPT, 16, seed=9)
            assert [(await answer).status for answer in asked] == [200] * len(asked)


async def test_who_has_no_load_takes_no_part(redis_server: RedisServer, redis: Redis) -> None:
    ours, theirs = fleet(), fleet()
    async with shared(redis_server, "a", ours) as inflight, shared(redis_server, "b", theirs):
        await redis.sadd(KEYS.routers, "gone")
        seats = FULL * ours["d"].info.max_num_seqs
        for number in range(seats // 2):  # of two sequences each
            theirs.reserve(attempt(number))
        while ours["d"].num_seqs.others < seats:
            await asyncio.wait_for(inflight.heard(), 10)
        while ours["d"].num_seqs.own < seats // 2:
            assert not ours["d"].full, "half of the seats are its part"
            ours.reserve(attempt(1))
        assert ours["d"].full


async def test_a_seat_that_another_router_left_is_given_at_once(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without workers nobody but the other routers tells of seats.
    async with deploy(prefill=0, decode=0) as served:
        served_waiting = asyncio.Event()
        monkeypatch.setattr(served.service._dispatcher, "serve_waiting", served_waiting.set)
        await asyncio.wait_for(served_waiting.wait(), 10)


def test_loads_add_up() -> None:
    assert Carried(1, 2, 3) + Carried(10, 20, 30) == Carried(11, 22, 33)
