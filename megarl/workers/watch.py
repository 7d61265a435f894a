"""Ends workers whose processes are too many or hold too much memory; the kernel bounds each process, but not all of a worker's."""

import threading
from collections.abc import Callable

from megarl.workers.process_tree import descendants, kill_tree, memory_of, resident_bytes

_INTERVAL = 0.1  # seconds


class Watch:
    """A thread that looks at the processes of workers until it is closed.

    Args:
        wrappers: how many of the processes below a root are the sandbox's own.
        memory: bytes that all processes of a worker may hold.
        processes: how many a worker may start at a time.
        section: of the configuration, for messages.
    """

    def __init__(self, *, wrappers: int, memory: int, processes: int, section: str) -> None:
        self._wrappers = wrappers
        self._memory = memory
        self._processes = processes
        self._section = section
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}  # by root: why it was ended, empty while it is well
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, root: int) -> None:
        """Watch the processes below ``root``."""
        with self._lock:
            self._reasons[root] = ""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="workers")
            self._thread.start()

    def remove(self, root: int) -> str:
        """Watch it no more, before it is reaped and its number is another's; why it was ended, empty if it was not from here."""
        with self._lock:
            return self._reasons.pop(root, "")

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._closing.clear()

    def _look(self) -> None:
        while not self._closing.wait(_INTERVAL):
            for root in list(self._reasons):
                self._check(root, self._fault)

    def _check(self, root: int, fault: Callable[[int], str]) -> None:
        with self._lock:  # held while it is killed, so that it cannot be reaped meanwhile
            if self._reasons.get(root) == "" and (reason := fault(root)):
                self._reasons[root] = reason
                kill_tree(root)

    def _fault(self, root: int) -> str:
        below = descendants(root)
        if len(below) - self._wrappers > self._processes:
            return f"its worker had more than {self._section}.processes = {self._processes} processes"
        everything = [root, *below]
        if resident_bytes(everything) > self._memory and memory_of(everything) > self._memory:
            return f"its worker used more than {self._section}.memory_gib = {self._memory / 2**30:g} GiB"
        return ""
