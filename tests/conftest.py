"""Fixtures that every test may use."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Architecture, write_checkpoint
from tests.redis_server import RedisServer

MakeCheckpoint = Callable[..., Path]
"""`(architecture, **options of write_checkpoint) -> directory`."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Makes a tiny checkpoint, or returns the one that was made with the same arguments. Shared by
    the whole session: copy it before changing a file."""
    made: dict[str, Path] = {}

    def make(architecture: Architecture, **options: Any) -> Path:
        key = f"{architecture} {sorted(options.items())}"
        if key not in made:
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
