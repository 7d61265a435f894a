"""Call the user's own async code on the trainer's event loop, whatever it raises and whatever processes it starts."""

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from megarl.errors import one_line
from megarl.workers.process_tree import kill_tree

T = TypeVar("T")

_GRACE = 1.0  # seconds in which what was cancelled should end


class CallFailure(Exception):
    """The call raised or ran out of time; the message is the reason."""


async def call_on_loop(function: Callable[[], Awaitable[T]], timeout: float, late: str) -> T:
    """Return what the call gives within ``timeout`` seconds.

    It runs in a task of its own, so that a CancelledError, a SystemExit or a KeyboardInterrupt that it lets out is its failure and
    ends nothing else. Processes that it started through ``subprocess`` or asyncio, and all below them, end with a call that fails.

    Raises:
        CallFailure: it raised, or did not end in time; ``late`` is then the reason.
    """
    with children_end_with_task() as end_children:
        task = asyncio.create_task(_guarded(function))
        try:
            await asyncio.wait({task}, timeout=timeout)
            is_late = not task.done()
        finally:
            if not task.done():
                task.cancel()
                end_children()
                await asyncio.wait({task}, timeout=_GRACE)
                if not task.done():  # it goes on after a cancellation, and the run could never close its loop
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
        if is_late:
            raise CallFailure(late)
        if task.cancelled():
            raise CallFailure("CancelledError: it was cancelled, by nobody here")
        result = task.result()
        if isinstance(result, _Raised):
            end_children()
            raise CallFailure(one_line(result.error)) from result.error
        return result


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _guarded(function: Callable[[], Awaitable[T]]) -> T | _Raised:
    """Guard the loop from what a task raises: asyncio would let some of it end the whole loop."""
    try:
        return await function()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return _Raised(error)


_started: ContextVar[list[subprocess.Popen[Any]] | None] = ContextVar("_started", default=None)


@contextmanager
def children_end_with_task() -> Iterator[Callable[[], None]]:
    """Have tasks created in the block note the processes that they start; give the function that kills those.

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
