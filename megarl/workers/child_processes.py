"""Processes that the user's own async code starts on the trainer's event loop, so that they can end with it."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from megarl.workers.process_tree import kill_tree

_started: ContextVar[list[subprocess.Popen[Any]] | None] = ContextVar("_started", default=None)


@contextmanager
def children_end_with_task() -> Iterator[Callable[[], None]]:
    """Within it, tasks that are created here note the processes that they start; gives the function that kills those.

    Processes are noted where ``subprocess`` and asyncio start them, in ``subprocess.Popen``; a bare ``os.fork`` is not.
    """
    _note_processes()
    started: list[subprocess.Popen[Any]] = []
    token = _started.set(started)

    def end_all() -> None:
        for process in started:
            if process.returncode is None:  # not poll(), which would take its end from asyncio
                kill_tree(process.pid)

    try:
        yield end_all
    finally:
        _started.reset(token)


def _note_processes() -> None:
    start = subprocess.Popen.__init__
    if hasattr(start, "__wrapped__"):
        return

    @wraps(start)
    def start_and_note(self: subprocess.Popen[Any], *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        started = _started.get()
        if started is not None:
            started.append(self)

    subprocess.Popen.__init__ = start_and_note  # type: ignore[method-assign]
