"""Limits of latency that requests are served within: their text form, and what a router is told.

Used by `router.main`, `router.dispatch` and `tandem simulate`.
"""

import re
from dataclasses import dataclass
from typing import Final

from common.errors import ConfigError

STEP_S: Final = 0.05
"""Limit of a decode step for placement, where none is given: 20 tokens a second, which nobody reads
faster."""
_NUMBER: Final = r"(\d+(?:\.\d+)?|\.\d+)"
_LIMIT: Final = re.compile(rf"{_NUMBER}(ms|s)(?:\+{_NUMBER}x)?")


@dataclass(frozen=True, slots=True)
class Limit:
    """Of a time to first token."""

    seconds: float
    factor: float = 0.0
    """Added to `seconds`: this many times the prefill of the prompt without any cache."""

    def of(self, uncached_s: float) -> float:
        """The limit of a prompt whose prefill takes `uncached_s` seconds without any cache."""
        return self.seconds + self.factor * uncached_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What is not served within these limits is refused early; None: whatever comes is served."""

    ttft: Limit | None = None
    itl_s: float | None = None


def parse_limit(text: str, flag: str) -> Limit:
    """`2s`, `500ms` or `2s+1.5x`. Raises ConfigError, which names `flag`."""
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{flag}: {text!r} is no limit such as 2s+1.5x or 500ms")
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1)
    return Limit(seconds, float(match[3] or 0))


def parse_time(text: str, flag: str) -> float:
    """Seconds of `50ms` or `2s`. Raises ConfigError, which names `flag`."""
    limit = parse_limit(text, flag) if "+" not in text else None
    if limit is None:
        raise ConfigError(f"{flag}: {text!r} is no time such as 50ms")
    return limit.seconds


def parse(ttft: str | None, itl: str | None) -> Slo:
    """What `--slo-ttft` and `--slo-itl` say. Raises ConfigError."""
    return Slo(
        ttft=None if ttft is None else parse_limit(ttft, "--slo-ttft"),
        itl_s=None if itl is None else parse_time(itl, "--slo-itl"),
    )
