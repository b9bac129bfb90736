"""Keys of tenants: hashed in a file, read anew when it changes; what they cache stays apart."""

import asyncio
import os
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from common.errors import ConfigError
from common.messages import Prefill
from common.redis_client import open_redis
from router.cors import Cors
from router.keys import Keys, read
from router.shared_keys import SharedKeys
from tests.redis_server import RedisServer
from tests.router.conftest import Deploy
from tests.router.deployment import until


def line(tenant: str, key: str) -> str:
    return f"{tenant} {sha256(key.encode()).hexdigest()}\n"


def test_a_file_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n" + line("red", "k1") + line("red", "k2") + line("blue", "k3"))
    keys = Keys("main", path)
    asked = [keys.tenant(key) for key in (b"k1", b"k2", b"k3", b"main", b"k4", b"")]
    assert asked == ["red", "red", "blue", "", None, None]
    path.write_text(line("green", "k4"))
    os.utime(path, ns=(1, 1))
    keys._next_look = 0.0
    assert [keys.tenant(key) for key in (b"k1", b"k4", b"main")] == [None, "green", ""]
    for bad in ("red secret\n", "red\n"):
        path.write_text(bad)
        keys._next_look = 0.0
        assert keys.tenant(b"k4") == "green"
        with pytest.raises(ConfigError, match="line 1 is not 'TENANT SHA256'"):
            read(path)
    path.unlink()
    keys._next_look = 0.0
    assert keys.tenant(b"k4") == "green"
    assert "stay as they were" in caplog.text and "secret" not in caplog.text
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(None, path)


async def test_tenants_do_not_share_a_cache(deploy: Deploy, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("red", "k1") + line("blue", "k2"))
    async with deploy(api_keys=path) as served:
        body = {"prompt": [3], "max_tokens": 1, "cache_salt": "s"}
        for key, status in (("k1", 200), ("k2", 200), ("k3", 401)):
            headers = {"authorization": f"Bearer {key}"}
            response = await served.http.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == status
        salts = [work.salt for work in served.prefills[0].received(Prefill)]
        assert salts == ["red\0s", "blue\0s"]
        forged = {**body, "cache_salt": "red\0s"}
        headers = {"authorization": "Bearer k2"}
        response = await served.http.post("/v1/completions", json=forged, headers=headers)
        assert response.status_code == 400


async def test_keys_in_redis_come_and_go(deploy: Deploy, router_redis: str) -> None:
    async with deploy(shared_keys=True) as served, open_redis(router_redis) as redis:
        name = f"tandem:{served.namespace}:api-keys"
        body = {"prompt": [3, 4], "max_tokens": 2, "n": 2}

        async def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            answer = await served.http.post("/v1/completions", json=body, headers=headers)
            return answer.status_code

        async def load() -> None:
            shared = SharedKeys(router_redis, served.namespace, served.keys)
            await shared.load()
            await shared.close()

        await load()
        assert [await status(key) for key in ("k1", "k2")] == [401, 401]
        for tenant, key in (("red", "k1"), ("red", "k2"), ("blue", "k3")):
            await redis.hset(name, sha256(key.encode()).hexdigest(), tenant)
        await redis.hset(name, "no hash", "red")
        await load()
        assert [await status(key) for key in ("k1", "k2", "k3", "k4")] == [200, 200, 200, 401]
        await redis.hdel(name, sha256(b"k1").hexdigest())
        await load()
        assert [await status(key) for key in ("k1", "k2")] == [401, 200]
        used = {
            (tenant, what): served.value(f"tenant_{what}_total", tenant=tenant)
            for tenant in ("red", "blue")
            for what in ("requests", "prompt_tokens", "output_tokens")
        }
        assert used == {
            ("red", "requests"): 3, ("red", "prompt_tokens"): 6, ("red", "output_tokens"): 12,
            ("blue", "requests"): 1, ("blue", "prompt_tokens"): 2, ("blue", "output_tokens"): 4,
        }  # fmt: skip


async def test_keys_are_followed_through_an_outage(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(are_shared=True)
    following = asyncio.create_task(SharedKeys(redis_server.url, "ns", keys).run())
    async with open_redis(redis_server.url) as redis:
        await redis.hset("tandem:ns:api-keys", sha256(b"k1").hexdigest(), "red")
        await until(lambda: keys.tenant(b"k1") == "red")
    redis_server.kill()
    await until(lambda: "stay as they were" in caplog.text)
    assert keys.tenant(b"k1") == "red"
    redis_server.start()
    async with open_redis(redis_server.url) as redis:
        await redis.hset("tandem:ns:api-keys", sha256(b"k2").hexdigest(), "red")
        await until(lambda: keys.tenant(b"k2") == "red")
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_browsers(deploy: Deploy) -> None:
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}
    async with deploy(api_key="k", cors=Cors(origins=("http://page",))) as served:
        async with httpx.AsyncClient(base_url=served.url) as http:
            answer = await http.options("/v1/completions", headers=preflight)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "http://page"
            assert "access-control-allow-credentials" not in answer.headers
            other = await http.options(
                "/v1/completions", headers={**preflight, "origin": "http://x"}
            )
            assert other.status_code == 400
    named = Cors(origins=("http://page",), methods=("GET",), headers=("x-a",), credentials=True)
    async with deploy(cors=named) as served:
        answer = await served.http.options(
            "/v1/models", headers={**preflight, "access-control-request-method": "GET"}
        )
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["access-control-allow-methods"] == "GET"
        assert "x-a" in answer.headers["access-control-allow-headers"]
        assert (await served.http.options("/v1/models", headers=preflight)).status_code == 400
    async with deploy() as served:
        answer = await served.http.options("/v1/completions", headers=preflight)
        assert answer.status_code == 405
