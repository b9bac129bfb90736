"""How much of the fault suites a run does: `pytest --faults small|full|soak`."""

from dataclasses import dataclass
from typing import Final

SCALES: Final = {"small": 1 / 50, "full": 1.0, "soak": 20.0}


@dataclass(frozen=True)
class Volume:
    """The same code and seeds, more or fewer of them."""

    name: str

    def of(self, full: int) -> int:
        """How many of the `full` number of cases this run does, at least one."""
        return max(1, round(full * SCALES[self.name]))
