"""How much memory a KV pool takes and how much there is. No torch: the launcher calls this too."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Final

from common.errors import ConfigError
from common.kv.layout import KvLayout

UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MAX_BYTES: Final = (1 << 63) - 1
CGROUP: Final = Path("sys/fs/cgroup")


def memory_for(layout: KvLayout, num_blocks: int) -> int:
    """Bytes of a pool of `num_blocks` blocks."""
    return num_blocks * layout.block_bytes


def num_blocks_for(layout: KvLayout, num_bytes: int) -> int:
    """Blocks that fit into `num_bytes`. Raises ConfigError if there is not room for one."""
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"{num_bytes:,} bytes of KV memory hold no block of {layout.block_size} tokens, "
            f"which takes {layout.block_bytes:,} bytes"
        )
    return num_blocks


def parse_memory(text: str) -> int:
    """Bytes of a size such as `512M`, `1.5G`, `4GiB` or `1048576`; units are powers of 1024.

    Raises ConfigError if it is no such size, 0, or more than 64 bits can count.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.I | re.ASCII)
    if match is None:
        raise ConfigError(f"{text!r} is not a memory size such as 512M or 4G")
    num_bytes = int(Decimal(match[1]) * UNITS[match[2].upper()])
    if not 0 < num_bytes <= MAX_BYTES:
        raise ConfigError(f"memory size {text!r} is out of range")
    return num_bytes


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could take now without swapping or being killed.

    The least of what the machine has (MemAvailable) and what the limits of this process's cgroups
    (v1 and v2, every ancestor) leave. `root` is where /proc and /sys are. Raises ConfigError where
    the system does not say.
    """
    try:
        available = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        raise ConfigError("cannot tell how much memory is free; give --kv-memory") from None
    return max(0, min([available, *_cgroup_rooms(root)]))


def _cgroup_rooms(root: Path) -> list[int]:
    """Bytes left under the memory limit of each cgroup that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / CGROUP / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's and not exist here; the mount itself does.
        group = mount / path.strip("/")
        for directory in (group, *group.parents):
            room = _room(directory, *names)
            if room is not None:
                rooms.append(room)
            if directory == mount:
                break
    return rooms


def _room(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Bytes left in one cgroup, its droppable page cache included; None if it has no limit."""
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        cache = _fields(group / "memory.stat").get(reclaimable, 0)
    except (OSError, ValueError):  # no such file here, or the limit is `max`
        return None
    return most - used + cache


def _fields(path: Path) -> dict[str, int]:
    """Lines of `name number ...` as a dict; other lines are skipped."""
    words = (line.split() for line in path.read_text().splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}
