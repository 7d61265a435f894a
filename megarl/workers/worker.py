"""The worker process: reads requests from stdin and answers on what was stdout.

It ends when its stdin does, so it never outlives the run, however the run ended. A frame is its length and its bytes: a pickle on
the way in, which comes from the trainer, and JSON on the way out, because what comes from here may be a response's own work.
"""

import json
import os
import pickle
import queue
import signal
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from megarl.errors import one_line
from megarl.workers.limits import limit_this_process

FRAME_LENGTH = struct.Struct("<Q")
_MAX_REASON = 1000  # characters

AnswerFunction = Callable[[Any], Any]


def pack_request(token: str, value: object) -> bytes:
    """Return the bytes of a request; the answer to it repeats ``token``."""
    return _frame(pickle.dumps((token, value)))


def main(build: Callable[[object], AnswerFunction], *, memory: int, processes: int, is_apart: bool) -> None:
    """Answer each request with ``{"token", "answer"}`` or ``{"token", "failure"}``, the reason why there is none.

    The first request is what ``build`` makes the answering function of. ``memory``, ``processes`` and ``is_apart``: see
    ``limit_this_process``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the run decides what ends
    limit_this_process(memory, processes, is_apart=is_apart)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # user code that prints must not write into the frames
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Reading in a thread lets the process end with the run even while user code loops for ever.
    threading.Thread(target=_read_frames, args=(requests, frames), daemon=True).start()
    answer: AnswerFunction | None = None

    def start(argument: object) -> None:
        nonlocal answer
        answer = build(argument)

    _write(answers, _answer_frame(start, frames.get()))
    while answer is not None:
        _write(answers, _answer_frame(answer, frames.get()))


def _answer_frame(answer: AnswerFunction, request: bytes) -> bytes:
    token, value = pickle.loads(request)
    reply: dict[str, object] = {"token": token}
    try:
        return _frame(json.dumps(reply | {"answer": answer(value)}).encode())
    except BaseException as error:  # user code may also raise SystemExit or CancelledError
        return _frame(json.dumps(reply | {"failure": one_line(error)[:_MAX_REASON]}).encode())


def _read_frames(stream: BinaryIO, frames: "queue.SimpleQueue[bytes]") -> None:
    while header := stream.read(FRAME_LENGTH.size):
        frames.put(stream.read(*FRAME_LENGTH.unpack(header)))
    os._exit(0)


def _frame(payload: bytes) -> bytes:
    return FRAME_LENGTH.pack(len(payload)) + payload


def _write(stream: BinaryIO, frame: bytes) -> None:
    stream.write(frame)
    stream.flush()
