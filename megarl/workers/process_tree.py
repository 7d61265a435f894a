"""The processes below a worker: who they are, what memory they hold, and their end."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_END_TIMEOUT = 5.0  # seconds; killed processes end in milliseconds, unless they wait for a disk


def descendants(root: int) -> list[int]:
    """Return the processes below ``root`` that have not ended."""
    found: list[int] = []
    waiting = [root]
    while waiting:
        children = [child for child in _children(waiting.pop()) if _state(child) not in ("Z", "X", "")]
        found += children
        waiting += children
    return found


def memory_of(processes: list[int]) -> int:
    """Return the bytes that they hold; what several share counts once where the kernel says how much that is."""
    return sum(map(_proportional_bytes, processes))


def resident_bytes(processes: list[int]) -> int:
    """Return the same with shared memory counted for each: never less, and quick to ask for."""
    return sum(map(_resident_bytes, processes))


def kill_tree(root: int) -> None:
    """Kill the process and all below it, and wait until those below have ended; the caller reaps the root.

    The root is stopped first and is the reaper of its orphans (PR_SET_CHILD_SUBREAPER, or the init of its own namespace), so that
    nothing below it gets away.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(root, signal.SIGSTOP)
        deadline = time.monotonic() + _END_TIMEOUT
        while (below := descendants(root)) and time.monotonic() < deadline:
            for process in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.001)
        os.kill(root, signal.SIGKILL)


def _children(process: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:  # it has ended
        return
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield from map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _proportional_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has hidden itself, or ended
        return _resident_bytes(process)
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
