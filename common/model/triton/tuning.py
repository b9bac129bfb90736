"""Tile shapes of the Triton kernels by device, from `tuning.json`: nothing is tuned at run time.

Two workers with the same table compute the same bits; a run-time search could choose otherwise on
each. Used by `common.model.triton.decoder`; `benchmarks.gpu --tune` finds better entries.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
import triton

TABLE: Final = Path(__file__).with_name("tuning.json")
OTHER: Final = "other"
"""The smallest tiles, which fit every device; also for the interpreter."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How one kernel is cut."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """The entries of one device."""

    name: str
    timed: bool
    """Whether the entries were measured on that device."""
    table: dict[str, dict[str, dict[str, int]]]

    def shape(self, kernel: str, head_dim: int = 0, element_bytes: int = 2) -> Shape:
        """kernel: `prefill`, `decode` or `linear`."""
        entries = self.table[kernel]
        key = f"{triton.next_power_of_2(head_dim)}x{element_bytes}"
        entry = entries.get(key) or entries.get("any")
        if entry is None:
            # Sizes without an entry are not served fast, but they must fit.
            entry = _tables()[OTHER][kernel]["any"]
        return Shape(**entry)


def tuning_for(device: torch.device) -> Tuning:
    """The table whose key is in the device's name; the smallest tiles where there is none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else OTHER
    return tuning_named(name)


def tuning_named(name: str) -> Tuning:
    """As `tuning_for`, by the name of a device such as `NVIDIA H200`."""
    words = name.replace("-", " ").split()
    key = next((key for key in _tables() if key in words), OTHER)
    entry = dict(_tables()[key])
    return Tuning(key, entry.pop("timed"), entry)


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(TABLE.read_text())
    del tables["note"]
    return tables
