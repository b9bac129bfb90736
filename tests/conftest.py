"""Fixtures that every test may use."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.volume import SCALES, Volume
from tests.redis_server import RedisServer

if TYPE_CHECKING:
    from tests.checkpoints import Architecture

# Before torch is imported: a reference model's second thread only spins beside real workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is imported, by whomever: its kernels are tested in its interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

MakeCheckpoint = Callable[..., Path]
"""`(architecture, **options of write_checkpoint) -> directory`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=list(SCALES), default="small", help="size of fault suites")


@pytest.fixture(scope="session")
def volume(request: pytest.FixtureRequest) -> Volume:
    """How many cases a suite of faults does."""
    return Volume(request.config.getoption("--faults"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Makes a tiny checkpoint, or returns the one that was made with the same arguments. Shared by
    the whole session: copy it before changing a file."""
    made: dict[str, Path] = {}

    def make(architecture: "Architecture", **options: Any) -> Path:
        key = f"{architecture} {sorted(options.items())}"
        if key not in made:
            # Here, so that tests without a model do not wait for torch and transformers.
            from tests.checkpoints import write_checkpoint

            directory = tmp_path_factory.mktemp(architecture)
            made[key] = write_checkpoint(directory, architecture, **options)
        return made[key]

    return make


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """An empty Redis of this test's own, which the test may pause, kill and restart."""
    with tempfile.TemporaryDirectory(prefix="tandem-redis-") as directory:
        server = RedisServer(Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.close()
