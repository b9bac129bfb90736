"""Memory sizes as text, pools as bytes, and what is free under the limits of cgroups."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from common.kv.layout import KvLayout
from common.kv.memory import free_memory_bytes, memory_for, num_blocks_for, parse_memory

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
MIB = 1 << 20


def test_a_pool_and_its_memory() -> None:
    assert memory_for(LAYOUT, 3) == 3 * 4096
    assert num_blocks_for(LAYOUT, 3 * 4096) == 3
    assert num_blocks_for(LAYOUT, 4 * 4096 - 1) == 3
    with pytest.raises(
        ConfigError,
        match=r"^4,095 bytes of KV memory hold no block of 16 tokens, which takes 4,096 bytes$",
    ):
        num_blocks_for(LAYOUT, 4095)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("2K", 2048),
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        (" 1.5G ", 1536 * MIB),
        ("4GB", 4096 * MIB),
        ("4GiB", 4096 * MIB),
        ("4 GiB", 4096 * MIB),
        ("0.5T", 1 << 39),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1e9", "1,5G", "1.G", ".5G", "1P", "1 2G", "nan", "٣G", "1G\n2G"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r" is not a memory size such as 512M or 4G$"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0", "0.0G", "0.1", "9223372036854775808", "8388608T"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^memory size '{text}' is out of range$"):
        parse_memory(text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 1,000 MiB available and no cgroups."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\n")
    return tmp_path


def limit_v2(group: Path, limit: str, usage: int, cache: int) -> None:
    write(group / "memory.max", f"{limit}\n")
    write(group / "memory.current", f"{usage}\n")
    write(group / "memory.stat", f"anon 1\ninactive_file {cache}\n")


def limit_v1(group: Path, limit: int, usage: int, cache: int) -> None:
    write(group / "memory.limit_in_bytes", f"{limit}\n")
    write(group / "memory.usage_in_bytes", f"{usage}\n")
    write(group / "memory.stat", f"inactive_file 1\ntotal_inactive_file {cache}\n")


def test_without_cgroups(root: Path) -> None:
    assert free_memory_bytes(root) == 1000 * MIB


def test_cgroup_v2_counts_droppable_cache_as_free(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pods/ours\n")
    limit_v2(root / "sys/fs/cgroup/pods/ours", str(500 * MIB), 300 * MIB, 100 * MIB)
    assert free_memory_bytes(root) == 300 * MIB


def test_the_tightest_ancestor_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pods/ours\n")
    limit_v2(root / "sys/fs/cgroup/pods/ours", "max", 300 * MIB, 0)
    limit_v2(root / "sys/fs/cgroup/pods", str(400 * MIB), 350 * MIB, 0)
    assert free_memory_bytes(root) == 50 * MIB
    limit_v2(root / "sys/fs/cgroup/pods", "max", 350 * MIB, 0)
    assert free_memory_bytes(root) == 1000 * MIB


def test_inside_a_container_the_mount_is_the_group(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    limit_v2(root / "sys/fs/cgroup", str(200 * MIB), 50 * MIB, 0)
    assert free_memory_bytes(root) == 150 * MIB


def test_cgroup_v1(root: Path) -> None:
    write(root / "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/host/path\n0::/\n")
    limit_v1(root / "sys/fs/cgroup/memory", 600 * MIB, 100 * MIB, 20 * MIB)
    assert free_memory_bytes(root) == 520 * MIB
    limit_v1(root / "sys/fs/cgroup/memory/host/path", 130 * MIB, 100 * MIB, 20 * MIB)
    assert free_memory_bytes(root) == 50 * MIB
    limit_v1(root / "sys/fs/cgroup/memory/host/path", 9223372036854771712, 100 * MIB, 0)
    assert free_memory_bytes(root) == 520 * MIB


def test_above_the_limit_nothing_is_free(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    limit_v2(root / "sys/fs/cgroup", str(50 * MIB), 60 * MIB, 0)
    assert free_memory_bytes(root) == 0


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^cannot tell how much memory is free; give --kv-memory"
    ):
        free_memory_bytes(tmp_path)
    write(tmp_path / "proc/meminfo", "MemTotal: 1 kB\n")
    with pytest.raises(
        ConfigError, match=r"^cannot tell how much memory is free; give --kv-memory"
    ):
        free_memory_bytes(tmp_path)


def test_this_machine_has_some() -> None:
    assert free_memory_bytes() > 0
