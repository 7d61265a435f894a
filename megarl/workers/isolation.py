"""One call in a process of its own inside a worker, for code that takes a response for a program."""

import gc
import json
import os
import signal
from collections.abc import Callable
from typing import Any

from megarl.errors import one_line
from megarl.workers.limits import MAX_FILES, hide_from_other_processes, refuse_new_processes

_MAX_BYTES = 2**20  # of its answer


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a fork of this process that can start no other, and return its answer, a JSON value.

    Whatever the call changes is gone after it, so that one response cannot change the score of the next. The worker's own files are
    closed in the fork.

    Raises:
        RuntimeError: the function raised, or answered with too much or nothing.
    """
    hide_from_other_processes()
    gc.freeze()  # a collection in the fork would copy all memory of the worker
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        _answer_and_exit(writer, function, arguments)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        payload = stream.read(_MAX_BYTES + 1)
    if len(payload) > _MAX_BYTES:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise RuntimeError(f"the process that read the answer gave more than {_MAX_BYTES} bytes")
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        os._exit(1)  # killed, perhaps for memory: the worker is replaced and asked again
    try:
        reply = json.loads(payload)
        answer, failure = reply["answer"], reply["failure"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise RuntimeError("the process that read the answer gave no score") from None
    if failure is not None:
        raise RuntimeError(failure)
    return answer


def _answer_and_exit(writer: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        os.closerange(3, writer)
        os.closerange(writer + 1, MAX_FILES)
        refuse_new_processes()
        try:
            reply = {"answer": function(*arguments), "failure": None}
        except BaseException as error:
            reply = {"answer": None, "failure": one_line(error)}
        with os.fdopen(writer, "wb") as stream:
            stream.write(json.dumps(reply).encode())
    finally:
        os._exit(0)
