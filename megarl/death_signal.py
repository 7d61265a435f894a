"""No process of a run outlives the one that started it, however that one ended. Imports no torch."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; does nothing where there is no prctl.

    Not SIGINT, which torch sets for its ranks: a job in the background ignores it, and a rank in a collective is deaf to it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent_in_forks() -> None:
    """Do the same for this process and all that it, or a fork of it, will fork."""
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)


def end_with_parent_alone() -> None:
    """Do the same and ignore what asks a run to stop: a signal to the whole process group lets the parent save once more."""
    end_with_parent()
    for one in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN)
