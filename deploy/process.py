"""One supervised program: starts it, follows what it writes, ends it. Used by the supervisor.

STOPPED -> STARTING -> READY -> EXITED -> STARTING (restart)
                \\---------------/
"""

import asyncio
import enum
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence

from deploy.console import Console

TAIL_LINES = 12
LINE_LIMIT = 1 << 20
LAST_LINES_S = 1.0
"""How long the pipe of a dead program is read on, should something still hold it open."""


class State(enum.Enum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    EXITED = "exited"


class Process:
    """A program that runs once at a time, in a session of its own, and dies with the supervisor.

    The session keeps signals of the terminal away: the supervisor alone decides who ends when.
    Call from the main thread: the kernel ties the child to the thread that started it.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        console: Console,
        *,
        chatty: bool = False,
    ) -> None:
        """chatty: what it writes is kept for the case that it fails, and not shown."""
        self.name = name
        self.chatty = chatty
        self.state = State.STOPPED
        self.started_at = 0.0
        """Monotonic time of the last start."""
        self.returncode: int | None = None
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines of the present or last life."""
        self._argv = tuple(argv)
        self._env = dict(env)
        self._console = console
        self._child: asyncio.subprocess.Process | None = None
        self._life: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._child.pid if self._child is not None else 0

    @property
    def alive(self) -> bool:
        return self.state in (State.STARTING, State.READY)

    async def start(self) -> None:
        assert not self.alive, f"{self.name} runs already"
        self.tail.clear()
        self.returncode = None
        reader, writer = os.pipe()
        try:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "deploy.child", str(os.getpid()), *self._argv,
                stdin=asyncio.subprocess.DEVNULL, stdout=writer, stderr=writer,
                env=self._env, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self.started_at = time.monotonic()
        self.state = State.STARTING
        self._life = asyncio.create_task(self._live(self._child, reader))

    async def exited(self) -> None:
        """Returns when the present life is over and everything it wrote was read."""
        if self._life is not None:
            await asyncio.shield(self._life)

    def mark_ready(self) -> None:
        assert self.state is State.STARTING, self.state
        self.state = State.READY

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is alive; SIGKILL goes to whatever it started, too."""
        if not self.alive or self._child is None:
            return
        if number is signal.SIGKILL:
            self._kill_session(self._child.pid)
        else:
            try:
                self._child.send_signal(number)
            except ProcessLookupError:
                return  # it ended just now

    def _kill_session(self, pid: int) -> None:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # nobody is left

    async def _live(self, child: asyncio.subprocess.Process, descriptor: int) -> None:
        follower = asyncio.create_task(self._follow(descriptor))
        returncode = await child.wait()
        # What a dead program started would keep the pipe, memory and ports.
        self._kill_session(child.pid)
        await asyncio.wait({follower}, timeout=LAST_LINES_S)
        follower.cancel()
        self.returncode = returncode
        self.state = State.EXITED

    async def _follow(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=LINE_LIMIT)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
        )
        try:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:  # longer than the limit: readline dropped it
                    continue
                if not line:
                    return
                text = line.decode(errors="replace").rstrip()
                if text:
                    self.tail.append(text)
                    if not self.chatty:
                        self._console.line(self.name, text)
        finally:
            transport.close()
