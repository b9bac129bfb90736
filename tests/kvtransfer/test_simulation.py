"""Seeds of the simulation: safety under faults, progress after they are healed."""

from collections import Counter

import pytest

from kvtransfer.incoming import Incoming
from kvtransfer.protocol import DataBlock
from tests.kvtransfer.simulation import simulate

SEEDS = 200
BATCH = 50


@pytest.mark.parametrize("start", range(0, SEEDS, BATCH))
def test_no_violation_and_the_faults_really_happened(start: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(start, start + BATCH):
        for life in simulate(seed).lives:
            seen["lives"] += 1
            seen["arrived"] += life.stats.arrived
            seen["repeated"] += life.stats.rounds_repeated
            seen["damaged"] += life.stats.digest_errors
            seen["broken"] += life.stats.broken.total()
            seen["late"] += life.stats.dropped["transfer"] + life.stats.dropped["landed"]
    assert seen["arrived"] > 800
    assert seen["lives"] > 3 * BATCH
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
