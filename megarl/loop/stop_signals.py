"""SIGTERM and SIGUSR1: the run saves a checkpoint at the end of its step and ends; a second one ends it at once."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """The handler of a run's processes, which remembers that one of the signals came.

    It is inherited by forks. The process that made it passes a first signal on to its ranks, if it has forked them, or is a rank
    itself; a second ends it at once, and its ranks with it. A forked rank only remembers, so that signals to a whole process group,
    which come to it twice, do no harm. Anything else that was forked ends as if there were no handler.
    """

    def __init__(self, *, forks_ranks: bool) -> None:
        self.is_made = False
        self._launcher = os.getpid()
        self._forks_ranks = forks_ranks

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle one of the signals."""
        if os.getpid() == self._launcher:
            for one in STOP_SIGNALS:  # first, so that a second signal ends the process even while the first is handled
                signal.signal(one, signal.SIG_DFL)
            self._announce(number)
            if self._forks_ranks:
                for rank in multiprocessing.active_children():
                    if rank.pid is not None:
                        os.kill(rank.pid, signal.SIGUSR1)
            self.is_made = True
        elif self._forks_ranks and os.getppid() == self._launcher:
            self.is_made = True
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _announce(self, number: int) -> None:
        name = signal.Signals(number).name
        line = f"{name}: the run saves a checkpoint at the end of this step and ends; a second signal ends it at once\n"
        os.write(sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else 2, line.encode())


@contextmanager
def stop_on_signals(*, forks_ranks: bool) -> Iterator[None]:
    """Handle the signals within the block; only a main thread can.

    Args:
        forks_ranks: this process forks the ranks; else it is one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = StopRequest(forks_ranks=forks_ranks)
    before = {one: signal.signal(one, handler) for one in STOP_SIGNALS}
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)


def stop_is_requested() -> bool:
    """Tell whether a signal came to any rank; collective, so that all of them stop at the same step."""
    handler = signal.getsignal(signal.SIGTERM)
    mine = isinstance(handler, StopRequest) and handler.is_made
    anywhere = torch.tensor([int(mine)])
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere)
