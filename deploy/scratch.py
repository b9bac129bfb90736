"""The private directory of one `tandem up`: Redis socket, random checkpoint. Made by `deploy.up`.

A supervisor that is killed cannot remove its directory; the next one that starts does. A lock
that ends with its process tells which directories are in use.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "tandem-"
LOCK = "lock"


def _sweep(parent: Path) -> None:
    """Remove the directories of this user whose process is gone."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
        except OSError:
            continue  # in use, somebody else's, or just removed by another one


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that only this user can enter; removed at the end."""
    parent = Path(tempfile.gettempdir())
    _sweep(parent)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        # Locked before it has its name, so that nobody finds it unlocked.
        with (directory / "unlocked").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (directory / "unlocked").rename(directory / LOCK)
            yield directory
    finally:
        shutil.rmtree(directory)
