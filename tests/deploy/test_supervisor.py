"""The supervisor with small real programs: coming up, starting again, ending in order."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from deploy.console import Console
from deploy.process import Process, State
from deploy.supervisor import Supervisor

SERVER = """
import pathlib, signal, sys, time
directory, name = pathlib.Path(sys.argv[1]), sys.argv[2]
def leave(*_):
    with (directory / "ended").open("a") as file:
        file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
(directory / (name + ".ready")).touch()
while True:
    time.sleep(600)
"""
STUBBORN = SERVER.replace("signal.signal(signal.SIGTERM, leave)", "signal.signal(15, lambda *_: 0)")
FAILING = "import sys; sys.exit('tandem decode: error: the checkpoint is corrupt')"


class Files:
    """Readiness by the file that a stand-in leaves; of one life only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def ready(self, starting: Sequence[Process]) -> set[str]:
        found = set()
        for process in starting:
            file = self._directory / f"{process.name}.ready"
            if file.exists():
                file.unlink()
                found.add(process.name)
        return found


class Fleet:
    """One process per stage, ended in the order of the names."""

    def __init__(self, directory: Path, *programs: tuple[str, str]) -> None:
        self.directory = directory
        console = Console(json=False)
        self.processes = [
            Process(name, [sys.executable, "-c", text, str(directory), name], os.environ, console)
            for name, text in programs
        ]
        self.supervisor = Supervisor([[process] for process in self.processes], console)
        self.readiness = Files(directory)

    async def start(self) -> Process | None:
        for process in self.processes:
            await self.supervisor.start(process, "starting")
        return await self.supervisor.until_ready(self.readiness, 20)

    async def until(self, process: Process, state: State, other_than: int = 0) -> None:
        """Wait until a process is in `state` in a life other than the one with that pid."""
        async with asyncio.timeout(20):
            while process.state is not state or process.pid == other_than:
                await asyncio.sleep(0.01)

    def ended(self) -> list[str]:
        return (self.directory / "ended").read_text().split()


async def test_drains_stage_by_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet(tmp_path, ("a", SERVER), ("b", SERVER), ("c", SERVER))
    assert await fleet.start() is None
    assert {process.state for process in fleet.processes} == {State.READY}
    await fleet.supervisor.drain(10)
    assert fleet.ended() == ["a", "b", "c"]
    assert [process.returncode for process in fleet.processes] == [0, 0, 0]
    lines = [line.split() for line in capfd.readouterr().err.splitlines()]
    assert [words[1] for words in lines if words[0] == "b"] == [
        "starting", "ready", "draining", "exited",
    ]  # fmt: skip


async def test_a_process_that_ends_at_start_is_reported(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ("a", SERVER), ("b", FAILING))
    failed = await fleet.start()
    assert failed is fleet.processes[1]
    assert failed.returncode == 1
    assert list(failed.tail) == ["tandem decode: error: the checkpoint is corrupt"]
    await fleet.supervisor.kill()


async def test_a_process_that_is_never_ready_is_reported(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ("a", "import time; time.sleep(600)"))
    await fleet.supervisor.start(fleet.processes[0], "starting")
    assert await fleet.supervisor.until_ready(fleet.readiness, 0.3) is fleet.processes[0]
    await fleet.supervisor.kill()
    assert fleet.processes[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_what_ends_later_is_started_again(tmp_path: Path, number: signal.Signals) -> None:
    fleet = Fleet(tmp_path, ("a", SERVER), ("b", SERVER))
    assert await fleet.start() is None
    keeper = asyncio.create_task(fleet.supervisor.keep(fleet.readiness))
    victim, other = fleet.processes
    first, untouched = victim.pid, other.pid
    os.kill(first, number)
    await fleet.until(victim, State.READY, other_than=first)
    second = victim.pid
    os.kill(second, number)
    await fleet.until(victim, State.READY, other_than=second)
    assert other.pid == untouched
    keeper.cancel()
    with suppress(asyncio.CancelledError):
        await keeper
    await fleet.supervisor.kill()


async def test_restarts_come_later_each_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fleet = Fleet(tmp_path, ("a", SERVER), ("b", FAILING))
    for process in fleet.processes:
        await fleet.supervisor.start(process, "starting")
    with suppress(TimeoutError):
        await asyncio.wait_for(fleet.supervisor.keep(fleet.readiness), 2.5)
    await fleet.supervisor.kill()
    lines = [line.split() for line in capfd.readouterr().err.splitlines()]
    delays = [words[-2] for words in lines if words[:2] == ["b", "waiting"]]
    assert delays[:2] == ["0.5", "1"]
    exits = [" ".join(words[2:]) for words in lines if words[:2] == ["b", "exited"]]
    assert exits[0] == "code 1: the checkpoint is corrupt"


async def test_who_does_not_end_in_time_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.supervisor.SLACK_S", 0.2)
    fleet = Fleet(tmp_path, ("a", STUBBORN), ("b", SERVER))
    assert await fleet.start() is None
    await fleet.supervisor.drain(0.1)
    assert [process.returncode for process in fleet.processes] == [-signal.SIGKILL, 0]


async def test_kill_ends_a_drain_that_takes_long(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ("a", STUBBORN), ("b", SERVER))
    assert await fleet.start() is None
    drain = asyncio.create_task(fleet.supervisor.drain(600))
    await asyncio.sleep(0.1)
    drain.cancel()
    with suppress(asyncio.CancelledError):
        await drain
    await fleet.supervisor.kill()
    assert [process.returncode for process in fleet.processes] == [-signal.SIGKILL] * 2
