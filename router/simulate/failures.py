"""Workers that fail in a simulation: `p0@100` or `d1@50+20`."""

import re
from dataclasses import dataclass

from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Failure:
    worker: str
    at: float
    """Seconds from the start."""
    down_s: float
    """Seconds until it is back, with an empty cache."""


def parse(text: str, num_prefill: int, num_decode: int) -> list[Failure]:
    """Failures separated by commas; a worker is down for 30 s unless `+SECONDS` says else.

    Raises ConfigError.
    """
    failures = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([pd])(\d+)@(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?", part)
        if match is None:
            raise ConfigError(f"--fail: {part!r} is no failure such as p0@100 or d1@50+20")
        role, number, at, down = match.groups()
        if int(number) >= (num_prefill if role == "p" else num_decode):
            raise ConfigError(f"--fail: there is no worker {role}{number}")
        failures.append(Failure(f"{role}{number}", float(at), float(down or 30)))
    return failures
