"""What a sweep measures: topologies of Tandem that it starts, and servers that run already."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.server import Command


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of every plot."""

    name: str
    units: float
    """Cores or GPUs that it has: figures per unit are divided by this."""
    prefill: int = 0
    decode: int = 0
    """Workers of a topology of Tandem; no decode worker: a rival."""
    url: str = ""
    """Where it runs already; empty: the sweep starts it."""
    model: str | None = None
    """Name of the model in requests; None: the server's default."""
    pinned: bool = True
    """Each worker has cores of its own."""

    @property
    def started(self) -> bool:
        """Whether the sweep starts and ends it."""
        return not self.url

    def to_json(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__slots__}


def _workers(text: str) -> tuple[str, int, int] | None:
    """Name, prefill and decode workers of a topology; None if the text names none."""
    if text.lower() == "colocated":
        return "colocated", 0, 1
    match = re.fullmatch(r"(\d+)p(\d+)d", text.lower())
    if match is None or int(match[2]) == 0:
        return None
    prefill, decode = int(match[1]), int(match[2])
    return f"{prefill}P{decode}D" if prefill else f"colocated x{decode}", prefill, decode


def topology(text: str, num_cores: int, units: float) -> Contender:
    """`colocated` (one worker on all cores) or such as `2p1d`; `0p2d`: two colocated workers.

    More workers than cores are not pinned. Raises ValueError.
    """
    found = _workers(text)
    if found is None:
        raise ValueError(f"--topologies: {text!r} is not colocated or such as 1p2d")
    name, prefill, decode = found
    return Contender(name, units, prefill, decode, pinned=prefill + decode <= num_cores)


def running(text: str, units: float) -> Contender:
    """`NAME=URL[,model=NAME][,units=N]`; a name such as `1p2d` says that it is that topology, any
    other one a rival. Raises ValueError."""
    name, equals, rest = text.partition("=")
    url, *settings = rest.split(",")
    if not name or not equals or not re.match(r"https?://", url):
        raise ValueError(f"--url: {text!r} is not NAME=URL[,model=NAME][,units=N]")
    values: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ("model", "units") or not value:
            raise ValueError(f"--url: {setting!r} is not model=NAME or units=N")
        values[key] = value
    try:
        units = float(values.get("units", units))
    except ValueError:
        raise ValueError(f"--url: units={values['units']} is not a number") from None
    if units <= 0:
        raise ValueError("--url: units must be above 0")
    name, prefill, decode = _workers(name) or (name, 0, 0)
    return Contender(name, units, prefill, decode, url.rstrip("/"), values.get("model"))


def up_command(
    contender: Contender, port: int, cores: Sequence[int], model: str | None, flags: str
) -> Command:
    """`tandem up` of a topology on these cores; flags: further ones, as in a shell."""
    argv = [
        sys.executable, "-m", "deploy.cli", "up", "--port", str(port),
        "--prefill", str(contender.prefill), "--decode", str(contender.decode),
    ]  # fmt: skip
    if model is not None:
        argv += ["--model", model]
    if contender.pinned:
        argv += ["--pin-cores", ",".join(map(str, cores))]
    name = re.sub(r"\W+", "-", contender.name.lower())
    workers = contender.prefill + contender.decode
    return Command(name, (*argv, *shlex.split(flags)), port, tuple(cores), workers=workers)
