"""A real `tandem up` for system tests: started with given flags, and nothing left of it at the end.

with Deployment("--model", path, "--prefill", "2") as deployment:
    httpx.get(deployment.url + "/health")
    os.kill(deployment.pid("decode-0"), signal.SIGKILL)
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import psutil

READY = re.compile(r"^Serving .* at (http://\S+) ")
STARTED = re.compile(r"^(\S+) +(?:loading|starting) +pid (\d+)$")
GONE_S = 10.0
"""How long the kernel may take to end processes after the supervisor is dead."""


class Deployment:
    """Port 0 (any free one) unless `--port` is among the flags. A context manager; or `start`,
    then `stop` or `kill`, each of which asserts that nothing is left."""

    def __init__(self, *flags: str, timeout_s: float = 120.0, env: dict[str, str] | None = None):
        self.url = ""
        """Of the router; known when ready."""
        self.lines: list[str] = []
        """All that was written so far, stdout and stderr."""
        self._flags = flags if "--port" in flags else ("--port", "0", *flags)
        self._timeout_s = timeout_s
        self._env = env or {}
        self._changed = threading.Condition()
        self._seen: dict[int, psutil.Process] = {}

    # ---------------------------------------------------------------- start

    def launch(self) -> None:
        """Start the supervisor; it comes up by itself."""
        # A directory of its own shows what is left; a short one, since it holds a Unix socket.
        self.temporary = Path(tempfile.mkdtemp(prefix="td-", dir="/tmp"))
        self._shm_before = _shared_memory()
        env = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
        env |= {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        # Which worker computes a prompt is not to depend on how fast this machine is today.
        env |= {"TANDEM_LOCAL_PREFILL": "fallback"} | self._env
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "up", *self._flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
        )
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def start(self) -> Self:
        """Launch and wait until everything is ready."""
        self.launch()
        try:
            self.wait_for(READY)
        except BaseException:
            self.kill()
            raise
        return self

    def wait_for(self, pattern: str | re.Pattern[str], since: int = 0) -> re.Match[str]:
        """The first line from number `since` on that matches. Raises TimeoutError, or
        AssertionError if the supervisor ends first; both show what was written."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while True:
                for line in self.lines[since:]:
                    if match := expression.search(line):
                        return match
                since = len(self.lines)
                assert any(r.is_alive() for r in self._readers), self._story("ended")
                if time.monotonic() > deadline:
                    raise TimeoutError(self._story(f"never wrote {expression.pattern!r}"))
                self._changed.wait(0.5)

    # ---------------------------------------------------------------- look

    def pid(self, name: str) -> int:
        """Process id of the present life of `redis`, `router`, `prefill-0`, `decode-1`..."""
        found = [pid for started, pid in self._started() if started == name]
        assert found, self._story(f"has no {name}")
        return found[-1]

    def pids(self, role: str) -> list[int]:
        """Process ids of all workers of a role."""
        names = {name for name, _ in self._started()}
        return [self.pid(name) for name in sorted(names) if name.rpartition("-")[0] == role]

    # ---------------------------------------------------------------- end

    def stop(self, number: signal.Signals = signal.SIGTERM, code: int = 0) -> None:
        """Ask it to end, and assert how it did."""
        self._look()
        self.process.send_signal(number)
        self.wait(code)

    def stop_group(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to every process at once, as a terminal or a service manager does."""
        for process in self._look():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue  # it ended first
        self.wait(0)

    def kill(self) -> None:
        """SIGKILL the supervisor alone: everything else must go with it."""
        self._look()
        self.process.kill()
        self.process.wait()
        self._settle()
        self.assert_nothing_left(crashed=True)

    def wait(self, code: int) -> None:
        """Wait for the end; assert the exit code and that nothing is left."""
        try:
            returncode = self.process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self._story("did not end")) from None
        self._settle()
        assert returncode == code, self._story(f"ended with code {returncode}")
        self.assert_nothing_left(crashed=False)

    def assert_nothing_left(self, *, crashed: bool) -> None:
        """No process, shared memory, port or file. After a crash the private directory may stay:
        the next deployment of this user removes it."""
        deadline = time.monotonic() + GONE_S
        while alive := [p for p in self._seen.values() if _alive(p)]:
            assert time.monotonic() < deadline, self._story(f"left {alive}")
            time.sleep(0.02)
        left = {name for name in _shared_memory() - self._shm_before if not _in_use(name)}
        assert not left, self._story(f"left shared memory {left}")
        # A leader is a zombie before its last thread has closed the sockets.
        while self.url and not _is_free(self.url):
            assert time.monotonic() < deadline, self._story("left its port open")
            time.sleep(0.02)
        if not crashed:
            files = [path.name for path in self.temporary.glob("tandem-*")]
            assert not files, self._story(f"left {files}")
        shutil.rmtree(self.temporary)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            if error is None:
                self.stop()
            else:
                self.kill()

    # ---------------------------------------------------------------- inside

    def _look(self) -> list[psutil.Process]:
        """The supervisor and all its descendants; remembered for the check at the end."""
        top = psutil.Process(self.process.pid)
        found = [top, *top.children(recursive=True)]
        self._seen.update({process.pid: process for process in found})
        return found

    def _started(self) -> list[tuple[str, int]]:
        """(name, pid) of every life of a process, as the log told, text or JSON."""
        found = []
        for line in self.lines:
            if line.startswith("{"):
                record = json.loads(line)
                name, text = record.get("child"), record.get("detail", "")
                line = f"{name} {record['event']} {text}"
            if match := STARTED.match(line):
                found.append((match[1], int(match[2])))
        return found

    def _read(self, stream: object) -> None:
        assert hasattr(stream, "__iter__")
        for line in stream:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                if match := READY.match(line):
                    self.url = match[1]
                self._changed.notify_all()
            # Captured with the test that runs: a failure shows what the servers had to say.
            print(line, end="", file=sys.stderr)

    def _settle(self) -> None:
        for reader in self._readers:
            reader.join(GONE_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def _story(self, what: str) -> str:
        return f"the deployment {what}\n" + "\n".join(self.lines[-100:])


def _is_free(url: str) -> bool:
    """Whether a server could listen at this address now."""
    parts = urlsplit(url)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts.hostname, parts.port))
            probe.listen()
        except OSError:
            return False
    return True


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _in_use(name: str) -> bool:
    """Whether a living process, so somebody else, has this shared memory mapped."""
    for process in psutil.process_iter():
        try:
            if any(mapped.path == f"/dev/shm/{name}" for mapped in process.memory_maps()):
                return True
        except psutil.Error:
            continue  # it ended, or is not ours to look at
    return False


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
