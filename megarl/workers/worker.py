"""The worker process: reads requests from stdin and answers on what was stdout.

It ends when its stdin does, so it never outlives the run, however the run ended. A frame is a pickle after its length.
"""

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

FRAME_LENGTH = struct.Struct("<Q")

Answer = Callable[[Any], Any]


def pack_frame(value: object) -> bytes:
    """The bytes of one frame."""
    payload = pickle.dumps(value)
    return FRAME_LENGTH.pack(len(payload)) + payload


def main(build: Callable[[Any], Answer]) -> None:
    """Answer each request with ``(answer, None)`` or ``(None, reason of the failure)``.

    The first frame in is what ``build`` makes the answering function of; the first frame out is the reason why it cannot, or None.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the run decides what ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # user code that prints must not write into the frames
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Reading in a thread lets the process end with the run even while user code loops for ever.
    threading.Thread(target=_read_frames, args=(sys.stdin.buffer, frames), daemon=True).start()
    try:
        answer = build(pickle.loads(frames.get()))
    except Exception as error:
        _write(answers, pack_frame(one_line(error)))
        return
    _write(answers, pack_frame(None))
    while True:
        _write(answers, _answer_frame(answer, frames.get()))


def _answer_frame(answer: Answer, request: bytes) -> bytes:
    try:
        return pack_frame((answer(pickle.loads(request)), None))
    except Exception as error:
        return pack_frame((None, one_line(error)))


def _read_frames(stream: BinaryIO, frames: "queue.SimpleQueue[bytes]") -> None:
    while header := stream.read(FRAME_LENGTH.size):
        frames.put(stream.read(*FRAME_LENGTH.unpack(header)))
    os._exit(0)


def _write(stream: BinaryIO, frame: bytes) -> None:
    stream.write(frame)
    stream.flush()
