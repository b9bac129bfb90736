"""The tables of a comparison: medians over repeats, how much better each is than a baseline, and
how far from its floor."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.compare.loads import Column, Figures, Load

Measurements = Mapping[tuple[str, str], Sequence[Figures]]
"""(system, load) -> one entry per repeat."""


def median(measurements: Measurements, system: str, load: str, key: str) -> float | None:
    """The median over repeats, None if there is none."""
    values = [figures[key] for figures in measurements.get((system, load), ())]
    return statistics.median(values) if values else None


def ratio(column: Column, value: float | None, baseline: float | None) -> float | None:
    """How many times better than the baseline; below 1 is worse."""
    if not value or not baseline:
        return None
    return value / baseline if column.higher_is_better else baseline / value


def table(
    measurements: Measurements, systems: Mapping[str, str], loads: Sequence[Load], baseline: str
) -> str:
    """Markdown. systems: title by name, in the order of the rows. Each cell is a median and, in
    brackets, its ratio to `baseline`."""
    columns = [(load, column) for load in loads for column in load.columns]
    header = ["system", *(f"{load.name} {column.label}" for load, column in columns)]
    rows = [header]
    for name, title in systems.items():
        row = [title]
        for load, column in columns:
            value = median(measurements, name, load.name, column.key)
            better = ratio(column, value, median(measurements, baseline, load.name, column.key))
            row.append(_cell(value, None if name == baseline else better))
        rows.append(row)
    return _markdown(rows)


Floors = Mapping[str, Mapping[str, Mapping[str, float]]]
"""System -> load -> key of a column -> its floor."""


def floor_table(
    measurements: Measurements, systems: Mapping[str, str], loads: Sequence[Load], floors: Floors
) -> str:
    """Markdown: the floor of each figure and the share of it that a system reached; 100 % is
    perfect. Figures without a floor are left out."""
    columns = [
        (load, column)
        for load in loads
        for column in load.columns
        if any(column.key in of.get(load.name, ()) for of in floors.values())
    ]
    rows = [["floor (share reached)", *(f"{load.name} {c.label}" for load, c in columns)]]
    for name, title in systems.items():
        row = [title]
        for load, column in columns:
            floor = floors[name].get(load.name, {}).get(column.key)
            value = median(measurements, name, load.name, column.key)
            share = ratio(column, value, floor)
            row.append("-" if share is None else f"{_number(floor)} ({share:.0%})")
        rows.append(row)
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    header = rows[0]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: float | None, better: float | None) -> str:
    shown = _number(value)
    return shown if better is None else f"{shown} (x{better:.2f})"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
