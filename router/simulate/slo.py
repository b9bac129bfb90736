"""What a request must meet to count as good."""

import re
from dataclasses import dataclass
from typing import Final

from common.errors import ConfigError

_NUMBER: Final = r"(\d+(?:\.\d+)?|\.\d+)"
_TTFT: Final = re.compile(rf"{_NUMBER}(ms|s)(?:\+{_NUMBER}x)?")
_TIME: Final = re.compile(rf"{_NUMBER}(ms|s)")


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float
    ttft_factor: float
    """Added to `ttft_s`: this many times the prefill of the prompt without any cache."""
    tpot_s: float

    def ttft(self, uncached_s: float) -> float:
        """The limit of a prompt whose prefill takes `uncached_s` seconds without any cache."""
        return self.ttft_s + self.ttft_factor * uncached_s


def parse(ttft: str, tpot: str) -> Slo:
    """`2s+1.5x` or `500ms`, and `50ms`. Raises ConfigError."""
    first, second = _TTFT.fullmatch(ttft), _TIME.fullmatch(tpot)
    if first is None:
        raise ConfigError(f"--slo-ttft: {ttft!r} is no limit such as 2s+1.5x or 500ms")
    if second is None:
        raise ConfigError(f"--slo-tpot: {tpot!r} is no limit such as 50ms")
    return Slo(_seconds(first[1], first[2]), float(first[3] or 0), _seconds(second[1], second[2]))


def _seconds(number: str, unit: str) -> float:
    return float(number) / (1000 if unit == "ms" else 1)
