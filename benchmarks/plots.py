"""The pictures of a sweep, as SVG and PNG: drawn by `benchmarks.report` with matplotlib.

Colours are those of Okabe and Ito, told apart also by colour-blind people; markers differ too, and
each line carries its name. The report replaces the colours by those of the reader's theme.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from benchmarks.advice import number
from benchmarks.curves import Curve, Estimate

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#4b9cd3", "#7a5195", "#6b7280")
MARKERS = "osD^vPX*"
INK, MUTED, GRID, PAPER, GOAL = "#1c1e21", "#5f6670", "#e3e6ea", "#fefefe", "#2e7d4f"
"""Text, lesser text, lines of the grid, background, the region of the SLOs."""
SIZE = (8.0, 4.7)
"""Inches; fonts are 10 points."""
LABEL_GAP = 0.052
"""Least distance between two labels at the right edge, as share of the height."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10.0, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.linewidth": 0.8,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """One plot in three forms."""

    svg: str
    """Its letters are outlines: it looks alike everywhere."""
    page: str
    """SVG whose text is text: smaller, and a reader can search and copy it."""
    png: bytes


def draw(
    curves: Sequence[Curve], slo: Mapping[str, float], attainment: float, percentile: str, unit: str
) -> dict[str, Picture]:
    """By name: `tradeoff`, `goodput`, `attainment`."""
    pictures: dict[str, Callable[[Axes], None]] = {
        "tradeoff": lambda axes: _tradeoff(axes, curves, slo, percentile),
        "goodput": lambda axes: _goodput(axes, curves),
        "attainment": lambda axes: _attainment(axes, curves, attainment, unit),
    }
    result = {}
    for name, paint in pictures.items():
        # The salt makes equal pictures equal files.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            figure = Figure(figsize=SIZE, layout="constrained")
            paint(figure.add_subplot())
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=160)
            result[name] = Picture(_svg(figure, "path"), _svg(figure, "none"), png.getvalue())
    return result


def _svg(figure: Figure, letters: str) -> str:
    """letters: matplotlib's `svg.fonttype`."""
    with matplotlib.rc_context({"svg.fonttype": letters}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _tradeoff(
    axes: Axes, curves: Sequence[Curve], slo: Mapping[str, float], percentile: str
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = [
        (
            number_,
            curve,
            [s for s in curve.samples if _is_positive(s.ttft) and _is_positive(s.tpot)],
        )
        for number_, curve in enumerate(curves)
    ]
    ttfts = [s.ttft.value for _, _, samples in shown for s in samples if s.ttft]
    tpots = [s.tpot.value for _, _, samples in shown for s in samples if s.tpot]
    if not ttfts:
        return
    x_limits = _log_limits([*ttfts, *filter(None, [slo.get("ttft")])])
    y_limits = _log_limits([*tpots, *filter(None, [slo.get("tpot")])])
    axes.set(xlim=(x_limits[0], x_limits[1] * 1.6), ylim=y_limits)
    axes.figure.canvas.draw()  # the layout, which the places of the words depend on
    right, top = slo.get("ttft", x_limits[1]), slo.get("tpot", y_limits[1])
    axes.fill_between([x_limits[0], right], y_limits[0], top, color=GOAL, alpha=0.09, lw=0)
    axes.plot(
        [x_limits[0], right, right], [top, top, y_limits[0]], color=GOAL, lw=1, ls=(0, (4, 3))
    )
    axes.annotate(
        "within the SLOs", (right, y_limits[0]), (-6, 6), textcoords="offset points", ha="right",
        color=GOAL, fontsize=9,
    )  # fmt: skip
    named: list[tuple[int, str, list[float], list[tuple[float, float]]]] = []
    for index, curve, samples in shown:
        if not samples:
            continue
        x = [s.ttft.value for s in samples if s.ttft]
        y = [s.tpot.value for s in samples if s.tpot]
        for sample in samples:
            assert sample.ttft is not None and sample.tpot is not None
            at = (sample.ttft.value, sample.tpot.value)
            across, up = sample.ttft, sample.tpot
            axes.plot([max(across.low, x_limits[0]), across.high], [at[1]] * 2,
                      color=_colour(index), lw=4, alpha=0.22, solid_capstyle="round")  # fmt: skip
            axes.plot([at[0]] * 2, [max(up.low, y_limits[0]), up.high],
                      color=_colour(index), lw=4, alpha=0.22, solid_capstyle="round")  # fmt: skip
        _line(axes, index, x, y)
        named.append((index, curve.name, [s.rate for s in samples], list(zip(x, y, strict=True))))
    words = _Words(axes, [points for *_, points in named])
    for index, name, _, points in named:
        words.put(name, points[-1], _colour(index), 10, bold=True)
    for index, _, rates, points in named:
        # The ends first: between them, points are often close.
        for place in (-1, 0, *range(1, len(points) - 1)):
            words.put(f"{rates[place]:g}/s", points[place], _colour(index), 8)
    axes.set_xlabel(f"TTFT, {percentile} (ms)")
    axes.set_ylabel(f"TPOT, {percentile} (ms)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def _goodput(axes: Axes, curves: Sequence[Curve]) -> None:
    most = max(s.rate for c in curves for s in c.samples)
    axes.set(xlim=(0, most * 1.02), ylim=(0, most * 1.05))
    axes.plot([0, most], [0, most], color=MUTED, lw=1, ls=(0, (4, 3)))
    ends = []
    for index, curve in enumerate(curves):
        x = [0.0, *(s.rate for s in curve.samples)]
        goodput = [Estimate(0, 0, 0), *(s.goodput for s in curve.samples)]
        _band(axes, index, x, goodput)
        _line(axes, index, x, [g.value for g in goodput])
        ends.append((index, curve.name, x[-1], goodput[-1].value))
    axes.annotate(
        "all within the SLOs", (most * 0.55, most * 0.55), (-6, 4), textcoords="offset points",
        ha="right", color=MUTED, fontsize=9,
    )  # fmt: skip
    _labels(axes, ends)
    axes.set_xlabel("Requests sent (per second)")
    axes.set_ylabel("Requests within the SLOs (per second)")


def _attainment(axes: Axes, curves: Sequence[Curve], attainment: float, unit: str) -> None:
    most = max(s.rate / c.units for c in curves for s in c.samples)
    axes.set(xlim=(0, most * 1.02), ylim=(0, 1.04))
    axes.axhline(attainment, color=GOAL, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"goal: {attainment:.0%}", (0, attainment), (5, -4), textcoords="offset points", va="top",
        color=GOAL, fontsize=9,
    )  # fmt: skip
    ends = []
    for index, curve in enumerate(curves):
        x = [s.rate / curve.units for s in curve.samples]
        shares = [s.attainment for s in curve.samples]
        _band(axes, index, x, shares)
        _line(axes, index, x, [s.value for s in shares])
        held = curve.per_unit.value
        if held > 0:
            axes.plot([held, held], [0, attainment], color=_colour(index), lw=1, ls=":")
        sign = "\u2265 " if curve.capacity.at_least else ""
        ends.append((index, f"{curve.name}: {sign}{number(held)}/s", x[-1], shares[-1].value))
    _labels(axes, ends)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"Requests sent per {unit} (per second)")
    axes.set_ylabel("Requests within the SLOs")


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(
        x, y, color=_colour(index), lw=2, marker=MARKERS[index % len(MARKERS)], ms=6,
        mec=PAPER, mew=1, clip_on=False, zorder=3, solid_joinstyle="round",
    )  # fmt: skip


def _band(axes: Axes, index: int, x: Sequence[float], y: Sequence[Estimate]) -> None:
    low, high = [e.low for e in y], [e.high for e in y]
    axes.fill_between(x, low, high, color=_colour(index), alpha=0.16, lw=0)


def _is_positive(estimate: Estimate | None) -> bool:
    """There it is, and a logarithmic scale can show it: tokens that a client reads all at once
    have a TPOT of 0."""
    return estimate is not None and estimate.value > 0


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """With some room, and at least a factor of 4 between them."""
    low, high = min(values) / 1.35, max(values) * 1.35
    if high / low < 4:
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
    return low, high


class _Words:
    """Places text beside points so that it covers neither lines nor other text: on the first free
    side, or nowhere."""

    SIDES = ((1, 0), (0, -1), (0, 1), (-1, 0), (1, -1), (-1, 1), (1, 1), (-1, -1))
    STEP = 8.0
    """Pixels between the boxes that stand for a line."""

    def __init__(self, axes: Axes, lines: Sequence[Sequence[tuple[float, float]]]) -> None:
        self.axes = axes
        self.taken: list[tuple[float, float, float, float]] = []
        """Boxes in pixels: middle, width, height."""
        for line in lines:
            places = [self._pixels(point) for point in line]
            self.taken += [(x, y, 11.0, 11.0) for x, y in places]
            for (x, y), (to_x, to_y) in pairwise(places):
                steps = max(1, int(math.hypot(to_x - x, to_y - y) / self.STEP))
                for i in range(steps):
                    along = i / steps
                    self.taken.append((x + along * (to_x - x), y + along * (to_y - y), 4.0, 4.0))

    def _pixels(self, point: tuple[float, float]) -> tuple[float, float]:
        x, y = self.axes.transData.transform(point)
        return float(x), float(y)

    def put(
        self, text: str, point: tuple[float, float], colour: str, size: float, bold: bool = False
    ) -> None:
        """Leaves out what has no room, unless it is bold."""
        scale = self.axes.figure.dpi / 72
        width, height = 0.68 * size * len(text) * scale, 1.25 * size * scale
        x, y = self._pixels(point)
        boxes = [
            (x + dx * (width / 2 + 7 * scale), y + dy * (height / 2 + 5 * scale), width, height)
            for dx, dy in self.SIDES
        ]
        free = [box for box in boxes if not any(_overlap(box, other) for other in self.taken)]
        if not free and not bold:
            return
        box = (free or boxes)[0]
        self.taken.append(box)
        offset = ((box[0] - x) / scale, (box[1] - y) / scale)
        label = self.axes.annotate(
            text, point, offset, textcoords="offset points", ha="center", va="center",
            color=colour, fontsize=size, fontweight="bold" if bold else "normal", zorder=5,
        )  # fmt: skip
        label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground=PAPER)])


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return (
        abs(one[0] - other[0]) < (one[2] + other[2]) / 2
        and abs(one[1] - other[1]) < (one[3] + other[3]) / 2
    )


def _labels(axes: Axes, ends: Sequence[tuple[int, str, float, float]]) -> None:
    """Names at the right edge, beside the ends of their lines, moved apart where they would
    overlap. ends: (index, name, x, y) of the last points."""
    to_axes = axes.transAxes.inverted()
    placed = sorted(
        (float(to_axes.transform(axes.transData.transform((x, y)))[1]), index, name, x, y)
        for index, name, x, y in ends
    )
    heights = [min(max(height, 0.0), 1.0) for height, *_ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_GAP)
    highest = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], highest)
        highest = heights[i] - LABEL_GAP
    for height, (_, index, name, x, y) in zip(heights, placed, strict=True):
        axes.annotate(
            name, (x, y), (1.025, height), textcoords="axes fraction", va="center",
            color=_colour(index), fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _colour(index), "lw": 0.8, "alpha": 0.6,
                        "shrinkA": 1, "shrinkB": 6},
        )  # fmt: skip
