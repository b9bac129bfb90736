"""Runs a program and ends all of its session with whoever started this, however that one ends.

`python -m benchmarks.compare.guard PROGRAM ...`, in a session of its own, with a pipe as standard
input that the starter holds open. Rivals start processes that outlive them when they are killed,
and those would take time from everything that is measured later.
"""

import os
import signal
import subprocess
import sys
import threading


def _kill_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    program = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda number, frame: program.send_signal(number))
    threading.Thread(target=_kill_at_end_of_input, daemon=True).start()
    code = program.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
