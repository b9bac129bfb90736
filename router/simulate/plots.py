"""Plots of simulated runs, if matplotlib is installed: TTFT distributions, goodput against load."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from router.simulate.outcome import Outcome


def _pyplot() -> Any:
    """Raises ConfigError if matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise ConfigError("--plots needs matplotlib: pip install 'tandem[bench]'") from None


def check() -> None:
    """Raises ConfigError if nothing can be drawn."""
    _pyplot()


def draw(
    directory: Path,
    ttfts: Mapping[str, np.ndarray],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> list[Path]:
    """Writes `ttft.png` (`ttfts`: policy -> seconds, float64 [requests]) and `goodput.png`
    (`outcomes`: policy -> by ascending rate); returns their paths. Raises ConfigError."""
    plt = _pyplot()
    paths = [directory / "ttft.png", directory / "goodput.png"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        figure, axes = plt.subplots()
        for name, seconds in ttfts.items():
            shown = np.sort(seconds[np.isfinite(seconds)])
            axes.plot(shown, (1 + np.arange(len(shown))) / len(seconds), label=name)
        axes.set(xlabel="TTFT (s)", ylabel="part of the requests", xscale="log", ylim=(0, 1))
        axes.legend()
        figure.savefig(paths[0])
        plt.close(figure)
        figure, axes = plt.subplots()
        for name, series in outcomes.items():
            axes.plot([o.rate for o in series], [o.goodput for o in series], "o-", label=name)
        axes.set(xlabel="load (requests/s)", ylabel="goodput (requests/s)")
        axes.legend()
        figure.savefig(paths[1])
        plt.close(figure)
    except OSError as error:
        raise ConfigError(f"--plots {directory}: {error}") from None
    return paths
