"""Seeds of the simulation: safety under faults, progress after they are healed."""

from collections import Counter

import pytest

from kvtransfer.incoming import Incoming
from kvtransfer.protocol import DataBlock
from tests.faults.volume import Volume
from tests.kvtransfer.simulation import simulate

SEEDS = 75_000
"""Of `--faults full`; a fiftieth of them in a run of all tests."""
BATCHES = 4


@pytest.mark.timeout(0)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_violation_and_the_faults_really_happened(batch: int, volume: Volume) -> None:
    seen: Counter[str] = Counter()
    seeds = range(batch, volume.of(SEEDS), BATCHES)
    for seed in seeds:
        for life in simulate(seed).lives:
            seen["lives"] += 1
            seen["arrived"] += life.stats.arrived
            seen["repeated"] += life.stats.rounds_repeated
            seen["damaged"] += life.stats.digest_errors
            seen["broken"] += life.stats.broken.total()
            seen["late"] += life.stats.dropped["transfer"] + life.stats.dropped["landed"]
    assert seen["arrived"] > 8 * len(seeds)
    assert seen["lives"] > 3 * len(seeds)
    assert min(seen["repeated"], seen["damaged"], seen["broken"], seen["late"]) > 5, seen


def test_a_run_is_a_function_of_its_seed() -> None:
    one, other = (
        [(life.stats, life.ended, bytes(life.pool.memory)) for life in simulate(7).lives]
        for _ in range(2)
    )
    assert one == other


def test_the_simulation_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that does not look whether a block has landed already is found out."""

    def careless(self: Incoming, block: DataBlock, block_size: int) -> str:
        return "" if block.position in self.slots else "position"

    monkeypatch.setattr(Incoming, "objection", careless)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(SEEDS):
            simulate(seed)
