"""What a result must say about where it comes from: date, commit, machine, command."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def provenance() -> dict[str, Any]:
    """Date, commit (with `+` if files differ from it), machine, versions and command line."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": platform.python_version(),
            **dict(_versions("torch", "transformers")),
        },
        "command": " ".join([Path(sys.executable).name, *_arguments()]),
    }


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    """Of what is installed: a load client needs neither."""
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _arguments() -> list[str]:
    """The command line without directories of this machine."""
    return [Path(text).name if text.startswith("/") else text for text in sys.orig_argv[1:]]


def commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
    except FileNotFoundError:  # no git: an installed copy
        return "unknown"


def cpu_model() -> str:
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def cores(text: str) -> list[int]:
    """The cores that `text` lists, such as `0,2-4`; empty: all that this process may use.

    Raises ValueError for what is no list or cannot be used.
    """
    usable = sorted(os.sched_getaffinity(0))
    if not text:
        return usable
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a list of cores such as 0,2-4")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if wrong := sorted(found - set(usable)):
        raise ValueError(f"core {wrong[0]} is not among the usable cores {usable}")
    return sorted(found)


def busy_share(seconds: float = 2.0) -> float:
    """Share of all cores that is in use now, measured over `seconds`."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return fields[3] + fields[4], sum(fields[:8])  # idle and waiting for disks, all

    idle, total = ticks()
    time.sleep(seconds)
    idle_after, total_after = ticks()
    return 1.0 - (idle_after - idle) / max(1, total_after - total)
