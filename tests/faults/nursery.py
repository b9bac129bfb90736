"""Forks stub workers from a process that has everything imported: a life begins in milliseconds.

    python -m tests.faults.nursery

Reads a `Spec` per line; writes the reports of the workers and of their ends. Ends with its input,
and everything that it started with it.
"""

import os
import selectors
import signal
import socket
import sys
import traceback

import msgspec

from common.parent import die_with_parent
from tests.faults.spec import Ended, Spec
from tests.faults.stub_worker import run, say


def main() -> None:
    names: dict[int, str] = {}
    wake, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_up.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        unread = b""
        while True:
            for found, _ in selector.select():
                if found.fileobj is wake:
                    wake.recv(4096)
                    bury(names)
                    continue
                data = os.read(sys.stdin.fileno(), 1 << 16)
                if not data:
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    spec = msgspec.json.decode(line, type=Spec)
                    names[birth(spec, (wake, wake_up))] = spec.name


def birth(spec: Spec, ours: tuple[socket.socket, ...]) -> int:
    """Process id of a new worker."""
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in ours:
            end.close()
        die_with_parent(nursery)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = run(spec)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def bury(names: dict[int, str]) -> None:
    while names:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        say(Ended(names.pop(pid), pid, os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
