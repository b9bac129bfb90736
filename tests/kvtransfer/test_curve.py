"""Transfers between endpoints with CurveZMQ keys."""

from pathlib import Path

import pytest

from common.config import CurveConfig
from common.curve import CurveKeys, generate
from kvtransfer.commands import Arrived, Broken, Delivered, Key, Ticketed, Wanted
from tests.kvtransfer.node import FIRST, Node, running

KEY = Key(7, 1)


def both(directory: Path) -> tuple[CurveKeys, CurveKeys]:
    """Keys of two ends that accept each other."""
    found = []
    for name in ("p", "d"):
        generate(directory / name, name)
    for name, other in (("p", "d"), ("d", "p")):
        config = CurveConfig(
            curve_key=str(directory / name / f"{name}.key_secret"),
            curve_allow=str(directory / other),
        )
        found.append(CurveKeys.load(config))
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


@pytest.mark.usefixtures("transport")
async def test_allowed_keys_ship(tmp_path: Path) -> None:
    of_p, of_d = both(tmp_path)
    p, d = Node("p", 1, keys=of_p), Node("d", 2, keys=of_d)
    async with running(p, d):
        content = p.pool.fill(10, "block")
        p.open(KEY, d.peer, 16)
        assert await d.events.next(Wanted) == Wanted(KEY, p.peer, 16)
        d.grant(KEY, {0: 5})
        p.offer(KEY, [10])
        p.finish(KEY)
        assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 64)
        assert await p.events.next(Ticketed) == Ticketed(KEY, 1)
        assert await p.events.next(Delivered) == Delivered(KEY, 1, 64)
        assert d.pool.read(5) == content


async def test_sender_without_a_key_does_not_try(tmp_path: Path) -> None:
    _, of_d = both(tmp_path)
    p, d = Node("p", 1), Node("d", 2, keys=of_d)
    async with running(p, d):
        p.open(KEY, d.peer, 16)
        broken = await p.events.next(Broken, timeout_s=1.0)
        assert broken.key == KEY
        assert "--curve-key is not set here" in str(broken)
        assert d.events.empty()


async def test_sender_that_the_receiver_does_not_accept_is_broken(tmp_path: Path) -> None:
    of_p, of_d = both(tmp_path)
    strict = CurveKeys(of_d.public, of_d.secret, frozenset({of_d.public}))
    p, d = Node("p", 1, keys=of_p), Node("d", 2, keys=strict)
    async with running(p, d):
        p.open(KEY, d.peer, 16)
        assert (await p.events.next(Broken)).key == KEY
        assert d.events.empty()
