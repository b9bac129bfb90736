"""Becomes a supervised program: `python -m deploy.child PARENT_PID PROGRAM [ARGUMENT...]`.

Started by `deploy.process`. Setting this up here, and not between fork and exec of the
supervisor, keeps Python code out of a half-forked process that has threads.
"""

import os
import sys

from common.parent import die_with_parent


def main() -> None:
    parent_pid, program, *arguments = sys.argv[1:]
    die_with_parent(int(parent_pid))
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
