"""SIGKILL of either side of a fetch at every step of the protocol, by the victim itself.

Whoever loses the owner computes the rest; an owner that loses the fetcher has its blocks back; and
no token is wrong.
"""

import signal
from collections.abc import Sequence
from typing import Final

import pytest

from tests.faults.fleet import Fleet, fleet
from tests.faults.invariants import check
from tests.faults.volume import Volume

OWNER: Final = ("open", "offer", "close", "welcome", "ticket", "ship", "ack")
FETCHER: Final = ("hello", "begin", "grant", "accept", "land", "arrive")
"""Of a fetch whose blocks go in one message, which needs neither Landed nor Close."""
WHENS: Final = ("before", "after")
SAMPLE: Final = 5
"""Every so manieth of the steps is in a small run."""


def chosen(steps: Sequence[str], way: str, volume: Volume) -> list[str]:
    """All of the steps; in a small run some, other ones for each transport."""
    every = [f"{step}.{when}" for step in steps for when in WHENS]
    return every[len(way) % SAMPLE :: SAMPLE] if volume.name == "small" else every


async def arrived(workers: Fleet) -> float:
    """Fetches of all present workers that succeeded."""
    counters = [await workers.counters(life) for life in workers.present]
    return sum(found.get("fetches.arrived", 0.0) for found in counters)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_killed_owner_of_what_is_fetched(way: str, role: str, volume: Volume) -> None:
    """P or D fetches from D."""
    steps = chosen(OWNER, way, volume)
    async with fleet(way, seed=5) as workers:
        prefill = await workers.birth("prefill")
        decode = await workers.birth("decode")
        fetcher = prefill if role == "prefill" else decode
        for step in steps:
            owner = await workers.birth("decode", die_at=step)
            talk = await workers.converse(owner)
            await workers.arm(owner)
            request = workers.submit([*talk, 1, 2, 3], 6, on=(fetcher, decode, owner))
            await workers.until(lambda owner=owner: owner.code is not None)  # type: ignore[misc]
            await workers.finished(request)
            assert owner.last_words == step
            assert not request.failures, request
        killed = sum(life.code == -signal.SIGKILL for life in workers.lives)
        await check(workers, {"kills at their steps": (killed, len(steps))})


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_killed_fetcher(way: str, role: str, volume: Volume) -> None:
    """P or D fetches from D; its request is served by others then."""
    steps = chosen(FETCHER, way, volume)
    async with fleet(way, seed=6) as workers:
        await workers.birth("prefill")
        # Leases of the dead last a while: half a pool may be given away at a time.
        owner = await workers.birth("decode", num_blocks=256)
        for step in steps:
            fetcher = await workers.birth(role, die_at=step)
            talk = await workers.converse(owner)
            await workers.arm(fetcher)
            decode = owner if role == "prefill" else fetcher
            request = workers.submit([*talk, 1, 2, 3], 6, on=(fetcher, decode, owner))
            await workers.until(lambda life=fetcher: life.code is not None)  # type: ignore[misc]
            await workers.finished(request)
            assert fetcher.last_words == step
            assert request.failures == ["down"], request
        killed = sum(life.code == -signal.SIGKILL for life in workers.lives)
        await check(workers, {"kills at their steps": (killed, len(steps))})


async def test_fetches_of_every_pair(way: str) -> None:
    """P from D, P from P, D from D and D from P: nothing but the new tokens is computed."""
    async with fleet(way, seed=7) as workers:
        prefills = [await workers.birth("prefill") for _ in range(2)]
        decodes = [await workers.birth("decode") for _ in range(2)]
        for fetcher, owner in (
            (prefills[0], decodes[0]),
            (prefills[1], prefills[0]),
            (decodes[1], decodes[0]),
            (decodes[1], prefills[0]),
        ):
            before = await arrived(workers)
            decode = fetcher if fetcher in decodes else decodes[1]
            if owner in decodes:
                talk = await workers.converse(owner)
            else:
                talk = workers.random.choices(range(900), k=80)
                await workers.finished(workers.submit(talk, 1, on=(owner, decodes[0], None)))
            request = workers.submit([*talk, 1, 2, 3], 6, on=(fetcher, decode, owner))
            await workers.finished(request)
            assert not request.failures and await arrived(workers) == before + 1
        await check(workers, {"fetches": (await arrived(workers), 4)})
