"""Becomes a program on given cores: `python -m benchmarks.compare.pinned 0,1 PROGRAM ...`.

Every thread that the program starts inherits the cores.
"""

import os
import sys


def main() -> None:
    cores, program, *arguments = sys.argv[1:]
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
