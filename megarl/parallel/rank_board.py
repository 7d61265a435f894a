"""What the ranks of a world say of themselves in its store: the phase they are in, a sign of life, and how they failed."""

import faulthandler
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megarl.crash import append_crash

BEAT_SECONDS = 0.5  # between two signs of life
STACK_DELAY = 2.0  # seconds after another rank has left, until a rank that goes on writes down where it stands


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """Why a rank left.

    Attributes:
        rank: in the world.
        phase: of the run, such as ``update of step 3``.
        reason: on one line.
        is_consequence: another rank's end, or its silence, is all that this one knows of.
        error: name of the class in megarl.errors, empty for a failure that none describes.
        mistakes: the error's own texts.
        log: file with the traceback, empty where the error says enough.
    """

    rank: int
    phase: str
    reason: str
    is_consequence: bool
    error: str = ""
    mistakes: tuple[str, ...] = ()
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Where a rank is, and since when it says nothing new.

    Attributes:
        host, pid: its process.
        phase: that it said last.
    """

    host: str
    pid: int
    phase: str


class RankBoard:
    """The notes of all ranks.

    Args:
        store: of the world.
        world_size: ranks of the world.
    """

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store = dist.PrefixStore("ranks", store)
        self._world_size = world_size

    def announce(self, rank: int, phase: str) -> None:
        """Say which phase the rank begins."""
        note = RankStatus(host=socket.gethostname(), pid=os.getpid(), phase=phase)
        self._store.set(f"place/{rank}", json.dumps(asdict(note)))

    def status(self, rank: int) -> RankStatus | None:
        """Return what the rank announced last, None where it did not get so far."""
        key = f"place/{rank}"
        return RankStatus(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def post(self, failure: RankFailure) -> None:
        """Say that the rank leaves, and why."""
        self._store.set(f"failure/{failure.rank}", json.dumps(asdict(failure)))
        order = self._store.add("failures", 1)
        self._store.set(f"left/{order}", str(failure.rank))

    def failures(self) -> list[RankFailure]:
        """Return the failures of the ranks that left, in the order in which they did."""
        found = []
        for order in range(1, self._store.add("failures", 0) + 1):
            if self._store.check([f"left/{order}"]):  # else it was killed between the two
                values = json.loads(self._store.get(f"failure/{int(self._store.get(f'left/{order}'))}"))
                found.append(RankFailure(**values | {"mistakes": tuple(values["mistakes"])}))
        return found

    def beat(self, rank: int) -> None:
        """Give a sign of life."""
        self._store.add(f"beat/{rank}", 1)

    def beats(self) -> list[int]:
        """Return how many signs of life each rank has given."""
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world_size)]


class Heart:
    """A thread that gives signs of life, and writes down where its rank stands when others have left it behind.

    Args:
        store: a connection of its own, because a store's waits for what it is asked for.
        rank, world_size: this rank and all of them.
        folder: for the file; None for the system's temporary folder.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, folder: Path | None) -> None:
        self._board = RankBoard(store, world_size)
        self._rank = rank
        self._folder = folder
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megarl-heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the rank leaves."""
        self._ends.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        others_left_for = 0.0
        has_written = False
        try:
            while not self._ends.wait(BEAT_SECONDS):
                self._board.beat(self._rank)
                if self._board.failures():
                    others_left_for += BEAT_SECONDS
                if others_left_for > STACK_DELAY and not has_written:
                    has_written = True
                    write_stack(self._folder, self._rank)
        except (RuntimeError, OSError):  # the store is gone, which ends the rank too
            return


def crash_name(rank: int) -> str:
    """Name of the file with a rank's traceback, or the place where it hangs."""
    return f"crash_rank{rank}.log"


def write_stack(folder: Path | None, rank: int) -> Path:
    """Write where every thread of this process stands to its crash file."""
    path = append_crash("still here while other ranks have left:\n", folder, crash_name(rank))
    with path.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return path


_announce: Callable[[str], None] | None = None  # a process is one rank at most


def set_announcer(announce: Callable[[str], None] | None) -> None:
    """Have ``announce_phase`` of this process call ``announce``."""
    global _announce
    _announce = announce


def announce_phase(phase: str) -> None:
    """Say to the other ranks, and to who started this one, which phase this rank begins; nothing in a process that is no rank."""
    if _announce is not None:
        _announce(phase)
