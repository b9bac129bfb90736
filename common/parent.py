"""Tie a process to the life of its parent, so that nothing outlives a parent that was killed.

Called first thing by the programs of the launcher (`deploy.child`) and by other helper processes.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process (SIGKILL) when the thread that started it ends.

    The parent must have started it from a thread that lives as long as the parent means to, in
    practice its main thread. Survives exec. Exits at once if `parent_pid` is already gone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent_pid:  # it died before the call above took effect
        os._exit(1)
