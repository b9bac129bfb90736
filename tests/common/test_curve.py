"""Key files, and which router may talk to which worker over real sockets."""

import asyncio
import logging
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from common.config import CurveConfig, TimerConfig
from common.curve import Caller, CurveKeys, generate
from common.errors import ConfigError
from common.link import Down, LinkEvent, Message, RouterLink, Up, WorkerLink
from common.messages import Cancel, Load, Pong, WorkerInfo
from tests.worker_info import worker_info

TIMERS = TimerConfig(heartbeat_s=0.1, dead_after=3, router_silence_s=0.5)


@dataclass(frozen=True)
class Ring:
    """A directory of keys."""

    directory: Path

    def make(self, name: str, *allowed: str) -> CurveKeys:
        """The keys of `name`, who accepts `allowed`; missing pairs are made."""
        accepted = self.directory / f"accepted by {name}"
        accepted.mkdir()
        for other in {name, *allowed}:
            if not (self.directory / f"{other}.key").exists():
                generate(self.directory, other)
        for other in allowed:
            (accepted / f"{other}.key").write_bytes((self.directory / f"{other}.key").read_bytes())
        keys = CurveKeys.load(self.config(name))
        assert keys is not None
        return keys

    def config(self, name: str) -> CurveConfig:
        return CurveConfig(
            curve_key=str(self.directory / f"{name}.key_secret"),
            curve_allow=str(self.directory / f"accepted by {name}"),
        )


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return Ring(tmp_path)


@asynccontextmanager
async def pair(
    worker_keys: CurveKeys | None, router_keys: CurveKeys | None, announced: str | None = None
) -> AsyncIterator[tuple[WorkerLink, RouterLink, WorkerInfo]]:
    """A worker and a router that was told to connect to it."""
    worker = WorkerLink("127.0.0.1", TIMERS, worker_keys)
    router = RouterLink("r", TIMERS, router_keys)
    await worker.start()
    try:
        public = announced
        if public is None:
            public = "" if worker_keys is None else worker_keys.public.decode()
        info = msgspec.structs.replace(worker_info("w"), address=worker.address, curve_key=public)
        worker.set_info(info)
        router.connect(info)
        yield worker, router, info
    finally:
        await router.close()
        await worker.close()


async def first_event(router: RouterLink) -> LinkEvent:
    async with asyncio.timeout(5):
        return await router.receive()


async def test_allowed_keys_talk_both_ways(ring: Ring) -> None:
    async with pair(ring.make("worker", "router"), ring.make("router", "worker")) as ends:
        worker, router, info = ends
        receiving = asyncio.ensure_future(worker.receive())
        assert await first_event(router) == Up(info)
        router.send("w", Cancel(request=1, attempt=1))
        identity, message = await asyncio.wait_for(receiving, 5)
        assert message == Cancel(request=1, attempt=1)
        worker.send(identity, Pong(seq=1, epoch=info.epoch, steps=0, load=Load()))
        event = await first_event(router)
        assert isinstance(event, Message) and isinstance(event.message, Pong)


async def test_router_whose_key_the_worker_does_not_know_is_told(
    ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = ring.make("router", "worker")
    async with pair(ring.make("worker", "somebody"), stranger) as (worker, router, _):
        receiving = asyncio.ensure_future(worker.receive())
        assert await first_event(router) == Down("w", "key")
        receiving.cancel()
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert lines == [
        f"refused a connection: key {stranger.public.decode()} is not in --curve-allow",
        "cannot connect to worker w: it does not accept the key of this router",
    ]


@pytest.mark.parametrize(
    ("worker_has_keys", "router_has_keys", "reason"),
    [
        (True, False, "it wants a key, and --curve-key is not set here"),
        (False, True, "it has no key, and --curve-key is set here"),
        (True, True, "is not in --curve-allow"),
    ],
)
async def test_router_does_not_connect_to_a_worker_that_it_cannot_trust(
    ring: Ring,
    caplog: pytest.LogCaptureFixture,
    worker_has_keys: bool,
    router_has_keys: bool,
    reason: str,
) -> None:
    worker_keys = ring.make("worker", "router") if worker_has_keys else None
    router_keys = ring.make("router", "somebody") if router_has_keys else None
    async with pair(worker_keys, router_keys) as (_, router, _):
        assert await first_event(router) == Down("w", "key")
    assert reason in caplog.text


async def test_plain_client_gets_no_answer_from_a_worker_with_keys(ring: Ring) -> None:
    """Whatever the registry says: without the key nothing is read."""
    async with pair(ring.make("worker", "router"), None, announced="") as (worker, router, _):
        receiving = asyncio.ensure_future(worker.receive())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(router.receive(), 5 * TIMERS.heartbeat_s)
        assert not receiving.done()
        receiving.cancel()


def test_generated_files(tmp_path: Path) -> None:
    public, secret = generate(tmp_path / "keys", "decode")
    assert (public.name, secret.name) == ("decode.key", "decode.key_secret")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert "secret-key" not in public.read_text()
    with pytest.raises(ConfigError, match="is there already"):
        generate(tmp_path / "keys", "decode")
    with pytest.raises(ConfigError, match="no name for a key file"):
        generate(tmp_path, "../x")


def test_what_is_wrong_with_the_files_is_said(ring: Ring, tmp_path: Path) -> None:
    ring.make("a", "b")
    with pytest.raises(ConfigError, match="go together"):
        CurveConfig(curve_key="x")
    empty = tmp_path / "empty"
    empty.mkdir()
    secret = str(tmp_path / "a.key_secret")
    for key, allow, error in (
        (str(tmp_path / "missing"), str(empty), "cannot read the key file"),
        (str(tmp_path / "a.key"), str(empty), "holds no secret key"),
        (secret, str(tmp_path / "missing"), "is no directory"),
        (secret, str(empty), "nobody could connect"),
    ):
        with pytest.raises(ConfigError, match=error):
            CurveKeys.load(CurveConfig(curve_key=key, curve_allow=allow))
    assert CurveKeys.load(CurveConfig()) is None


def test_caller_without_keys_on_both_sides_has_no_objection(ring: Ring) -> None:
    keys = ring.make("a", "b")
    other = ring.make("b", "a")
    assert Caller(None, "").objection == ""
    assert Caller(keys, other.public.decode()).objection == ""
    assert Caller(keys, keys.public.decode()).objection.endswith("is not in --curve-allow")
