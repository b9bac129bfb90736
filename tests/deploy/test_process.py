"""One supervised program: what it wrote, how it ends, and that nothing outlives anybody."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.console import Console
from deploy.process import Process, State

SLEEP = "import time; time.sleep(600)"


def program(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def process(text: str, *arguments: str) -> Process:
    return Process("child", program(text, *arguments), dict(os.environ), Console(json=False))


async def until_written(path: Path) -> str:
    """The content of a file that another process writes in one go."""
    async with asyncio.timeout(20):
        while not path.exists():
            await asyncio.sleep(0.01)
    return path.read_text()


def gone(pid: int) -> bool:
    """Whether a process is dead; a zombie that waits for its new parent counts."""
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def test_life(capfd: pytest.CaptureFixture[str]) -> None:
    child = process("import os, sys; print(os.getpid()); print('low', file=sys.stderr); exit(3)")
    assert child.state is State.STOPPED
    await child.start()
    assert child.alive
    pid = child.pid
    await child.exited()
    assert (child.state, child.returncode, sorted(child.tail)) == (
        State.EXITED, 3, sorted([str(pid), "low"])
    )  # fmt: skip
    assert "child      | low" in capfd.readouterr().err


async def test_what_a_chatty_one_writes_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    argv = program("print('once upon a time')")
    child = Process("child", argv, dict(os.environ), Console(json=False), chatty=True)
    await child.start()
    await child.exited()
    assert list(child.tail) == ["once upon a time"]
    assert capfd.readouterr().err == ""


async def test_a_new_life_forgets_the_old_one() -> None:
    child = process("import os; print(os.getpid())")
    await child.start()
    await child.exited()
    first = list(child.tail)
    await child.start()
    await child.exited()
    assert len(child.tail) == 1 and list(child.tail) != first


async def test_terminated() -> None:
    child = process(SLEEP)
    await child.start()
    child.mark_ready()
    child.signal(signal.SIGTERM)
    await child.exited()
    assert (child.state, child.returncode) == (State.EXITED, -signal.SIGTERM)
    child.signal(signal.SIGTERM)  # of no effect


async def test_signals_of_the_terminal_do_not_reach_it() -> None:
    child = process(SLEEP)
    await child.start()
    assert os.getpgid(child.pid) == os.getsid(child.pid) == child.pid
    child.signal(signal.SIGKILL)
    await child.exited()


async def test_what_a_dead_program_started_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = process(
        "import os, subprocess, sys, pathlib\n"
        f"other = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.with_suffix('.new').write_text(str(other.pid))\n"
        "path.with_suffix('.new').rename(path)\n"
        "os.abort()",
        str(note),
    )
    await child.start()
    other = int(await until_written(note))
    await child.exited()
    assert child.returncode == -signal.SIGABRT
    assert gone(other)


async def test_very_long_lines_do_not_stop_the_reader() -> None:
    child = process("print('x' * 3_000_000); print('end')")
    await child.start()
    await child.exited()
    assert child.tail[-1] == "end"


async def test_the_environment_is_what_was_given() -> None:
    env = {"PATH": os.environ["PATH"], "ONLY": "this"}
    child = Process(
        "child", program("import os; print(os.environ.get('ONLY'))"), env, Console(json=False)
    )
    await child.start()
    await child.exited()
    assert list(child.tail) == ["this"]


def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    """SIGKILL leaves the supervisor no time for anything: the kernel ends its children."""
    supervisor = subprocess.Popen(
        program(
            "import asyncio, os, sys\n"
            "from deploy.console import Console\n"
            "from deploy.process import Process\n"
            "async def main():\n"
            f"    argv = [sys.executable, '-c', {SLEEP!r}]\n"
            "    child = Process('c', argv, os.environ, Console(False))\n"
            "    await child.start()\n"
            "    print(child.pid, flush=True)\n"
            "    await child.exited()\n"
            "asyncio.run(main())"
        ),
        stdout=subprocess.PIPE,
    )
    assert supervisor.stdout is not None
    with supervisor, supervisor.stdout:
        pid = int(supervisor.stdout.readline())
        supervisor.kill()
    assert gone(pid)


def test_a_child_whose_parent_is_gone_does_not_start() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deploy.child", "1", sys.executable, "-c", "print('started')"],
        capture_output=True,
        check=False,
    )
    assert os.getpid() != 1
    assert (result.returncode, result.stdout) == (1, b"")
