"""What `benchmarks.kernels` says: one measurement beside its floor, and the table of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

INTEGERS: Final = "w8a8"
"""The scheme whose products are of integers; the others' are of bfloat16."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a floor is made of."""

    threads: int
    bytes_per_s: float
    flops_per_s: float
    integers_per_s: float

    def rate(self, scheme: str | None) -> float:
        """Operations per second of products with weights of a scheme."""
        return self.integers_per_s if scheme == INTEGERS else self.flops_per_s


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement."""

    kernel: str
    threads: int
    ms: float
    floor_ms: float
    bound: str
    """`memory` or `compute`: which floor is the larger one."""
    gb_per_s: float
    gflop_per_s: float

    @property
    def share(self) -> float:
        """Of the floor: 1 is perfect."""
        return self.floor_ms / self.ms


def line(
    name: str,
    machine: Machine,
    seconds: float,
    num_bytes: float,
    flops: float,
    scheme: str | None = None,
    attention: float = 0.0,
) -> Line:
    """flops: all of them; attention: those of it that are of bfloat16 whatever the scheme."""
    memory = num_bytes / machine.bytes_per_s
    compute = (flops - attention) / machine.rate(scheme) + attention / machine.flops_per_s
    return Line(
        kernel=name,
        threads=machine.threads,
        ms=seconds * 1e3,
        floor_ms=max(memory, compute) * 1e3,
        bound="memory" if memory > compute else "compute",
        gb_per_s=num_bytes / seconds / 1e9,
        gflop_per_s=flops / seconds / 1e9,
    )


HEADER: Final = ("kernel", "ms", "floor ms", "share", "bound", "GB/s", "GFLOP/s")


def cells(one: Line) -> tuple[str, ...]:
    return (
        one.kernel, f"{one.ms:.3f}", f"{one.floor_ms:.3f}", f"{one.share:.0%}", one.bound,
        f"{one.gb_per_s:.1f}", f"{one.gflop_per_s:.1f}",
    )  # fmt: skip


def told(machine: Machine) -> str:
    return (
        f"{machine.threads} thread{'s' if machine.threads > 1 else ''}: reads "
        f"{machine.bytes_per_s / 1e9:.1f} GB/s, multiplies {machine.flops_per_s / 1e9:.0f} GFLOP/s "
        f"in bfloat16, {machine.integers_per_s / 1e9:.0f} GOP/s in 8-bit integers"
    )


def page(document: Mapping[str, Any], machines: Sequence[Machine], lines: Sequence[Line]) -> str:
    """The results as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *map(cells, lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    where = f"{document['machine']['cpu']}, {document['date'][:10]}, commit {document['commit']}"
    rates_ = "\n".join(f"- {told(machine)}" for machine in machines)
    return (
        f"# CPU kernels against their floors\n\n`{document['command']}`: {where}, machine "
        f"{document['busy_share']:.0%} busy before. Share: of the floor, 100 % is perfect.\n\n"
        f"{rates_}\n\n{table}\n"
    )
