"""The processes of one system under test: started on given cores, awaited, ended by their ids."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.compare.paths import ROOT

STOP_S = 30.0
"""How long a server may take to end before it is killed."""


class StartError(Exception):
    """A server did not come up; says why, with the end of its log."""


@dataclass(frozen=True, slots=True)
class Command:
    """One server process. It is ready when `http://127.0.0.1:port/health` answers 200, and all of
    its `workers` are there."""

    name: str
    argv: tuple[str, ...]
    port: int
    cores: tuple[int, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of this process."""
    workers: int = 0
    """Workers of a Tandem that must all be there; with some of them it serves already, but as
    another topology."""


def stop_cleanly() -> None:
    """Make SIGTERM end this process like Ctrl-C, so that servers are stopped first. For `main`s."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody used just now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def running(commands: Sequence[Command], logs: Path, timeout_s: float) -> Iterator[None]:
    """Start all commands at once and wait until each is ready; nothing is left of them afterwards.

    logs: directory for what they write. Raises StartError if one ends or is not ready in time.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        started = []
        for command in commands:
            path = logs / f"{command.name}.log"
            file = stack.enter_context(path.open("w"))
            process = _start(command, file)
            stack.callback(_stop, process)
            started.append((command, process, path))
        for command, process, path in started:
            _await(command, process, path, deadline)
        yield


def _start(command: Command, log: IO[str]) -> "subprocess.Popen[bytes]":
    # A session of its own, so that its children end with it; the pipe closes if this process dies.
    cores = ",".join(map(str, command.cores))
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare.guard", sys.executable, "-m",
         "benchmarks.compare.pinned", cores, *command.argv],
        cwd=ROOT, env=os.environ | command.env, start_new_session=True,
        stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _await(
    command: Command, process: "subprocess.Popen[bytes]", log: Path, deadline: float
) -> None:
    url = f"http://127.0.0.1:{command.port}"
    wanted = command.workers
    while not answers(f"{url}/health") or (wanted and num_workers(url, wanted) < wanted):
        if process.poll() is not None:
            raise StartError(f"{command.name} ended with code {process.returncode}{_tail(log)}")
        if time.monotonic() > deadline:
            raise StartError(f"{command.name} was not ready in time{_tail(log)}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether a GET gives 200 now."""
    try:
        with urllib.request.urlopen(url, timeout=5.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def num_workers(url: str, otherwise: int) -> int:
    """The live workers of a Tandem; `otherwise` if it does not tell: it wants a key."""
    try:
        with urllib.request.urlopen(f"{url}/debug/workers", timeout=5.0) as response:
            return len(json.load(response)["workers"])
    except urllib.error.HTTPError as error:
        return otherwise if error.code in (401, 403, 404) else 0
    except (urllib.error.URLError, OSError):
        return 0


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return "".join(f"\n    {line}" for line in (f"(the end of {log})", *lines))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, then SIGKILL for it and whatever it left in its session's group."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass  # killed below, together with its children
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
