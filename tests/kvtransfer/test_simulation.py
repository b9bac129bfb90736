"""Seeds of the simulation: safety under faults, progress after they are healed."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import msgspec
import pytest

from kvtransfer.commands import First
from kvtransfer.incoming import Incoming, Landing, Source
from kvtransfer.outgoing import Outgoing
from kvtransfer.outgoing_link import OutgoingLink
from kvtransfer.protocol import DataBlock, End
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.tombstones import Tombstones
from tests.faults.volume import Volume
from tests.kvtransfer.simulated_worker import FETCH
from tests.kvtransfer.simulation import Faults, simulate

SEEDS = 75_000
"""Of `--faults full`; a fiftieth of them in a run of all tests."""
BATCHES = 4
leases = partial(simulate, faults=Faults(pause=0.2), rests=0.6)
"""Receivers that are paused while senders have nothing to send: there nothing but its lease ends a
transfer, which is rare where other faults end it before."""
damages = partial(simulate, faults=Faults(corrupt=0.3))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_violation_and_the_faults_really_happened(batch: int, volume: Volume) -> None:
    seen: Counter[str] = Counter()
    seeds = range(batch, volume.of(SEEDS), BATCHES)
    for seed in seeds:
        for life in simulate(seed).lives:
            seen["lives"] += 1
            seen["arrived"] += life.stats.arrived
            seen["fetched"] += sum(key.attempt == FETCH for key in life.arrived)
            seen["repeated"] += life.stats.rounds_repeated
            seen["damaged"] += life.stats.digest_errors
            seen["broken"] += life.stats.broken.total()
            seen["late"] += life.stats.dropped["transfer"] + life.stats.dropped["landed"]
    assert seen["arrived"] > 8 * len(seeds)
    assert seen["fetched"] > 2 * len(seeds)
    assert seen["lives"] > 3 * len(seeds)
    assert min(seen["repeated"], seen["damaged"], seen["broken"], seen["late"]) > 5, seen


@pytest.mark.timeout(0)
def test_leases_are_lost(volume: Volume) -> None:
    """Without a violation, where little else happens."""
    seeds = range(volume.of(5_000))
    lost = sum(life.stats.broken["lease"] for seed in seeds for life in leases(seed).lives)
    assert lost > len(seeds) / 10


def test_a_run_is_a_function_of_its_seed() -> None:
    one, other = (
        [(life.stats, life.ended, bytes(life.pool.memory)) for life in simulate(7).lives]
        for _ in range(2)
    )
    assert one == other


def careless(self: Incoming, block: DataBlock, block_size: int) -> str:
    """Does not look whether a block has landed already."""
    return "" if block.position in self.slots else "position"


def any_slot(self: Incoming, block: DataBlock, block_size: int) -> str:
    """Looks neither at the slot nor at its generation."""
    known = block.position in self.slots
    return "" if known and block.position not in self.landed | self.writing else "position"


def believing(
    self: Receiver, landing: Landing, digests: Sequence[int | None], now: float, landed: Any
) -> None:
    """Does not compare digests."""
    blocks = zip(landing.header.blocks, digests, strict=True)
    landed(self, landing, [None if d is None else block.digest for block, d in blocks], now)


def trusting(self: End) -> tuple[First, ...] | None:
    """Does not look whether first tokens were damaged on the way."""
    try:
        return msgspec.msgpack.decode(self.first, type=tuple[First, ...])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def hasty(self: Receiver, transfer: Incoming, reason: str, nack: str, now: float, end: Any) -> None:
    """Gives a grant back while a copy is under way."""
    transfer.writing.clear()
    end(self, transfer, reason, nack, now)


def generous(self: Sender, link: OutgoingLink, transfer: Outgoing, now: float, tick: Any) -> None:
    """Renews its leases itself."""
    transfer.lease_until = now + 1000
    tick(self, link, transfer, now)


def endless(self: Receiver, source: Source, transfer: Incoming, now: float) -> None:
    """Waits for ever for what does not come."""


def forgetful(self: Tombstones[Any, Any], key: object) -> None:
    """Does not remember what has ended."""


@pytest.mark.parametrize(
    ("owner", "name", "mutant", "run"),
    [
        (Incoming, "objection", careless, simulate),
        (Incoming, "objection", any_slot, simulate),
        (Receiver, "landed", believing, simulate),
        (End, "read", trusting, damages),
        (Receiver, "_end", hasty, simulate),
        (Sender, "_tick_transfer", generous, leases),
        (Receiver, "_tick_transfer", endless, simulate),
        (Tombstones, "get", forgetful, simulate),
    ],
)
def test_the_simulation_bites(
    owner: type,
    name: str,
    mutant: Callable[..., object],
    run: Callable[[int], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without one check, some of the first seeds fail."""
    original = getattr(owner, name)
    if len(signature(mutant).parameters) > len(signature(original).parameters):

        def call(*args: Any) -> object:
            return mutant(*args, original)

        monkeypatch.setattr(owner, name, call)
    else:
        monkeypatch.setattr(owner, name, mutant)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(1000):
            run(seed)
