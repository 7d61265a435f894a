"""The worker process: reads scoring requests from stdin and answers on what was stdout.

It ends when its stdin does, so it never outlives the run, however the run ended. A frame is a pickle after its length.
"""

import math
import numbers
import os
import pickle
import queue
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from typing import BinaryIO

from megarl.rewards.document_qa import RuleScore
from megarl.rewards.scorers import Scorer, ScorerSpec, build_scorer, one_line

FRAME_LENGTH = struct.Struct("<Q")


def pack_frame(value: object) -> bytes:
    """The bytes of one frame."""
    payload = pickle.dumps(value)
    return FRAME_LENGTH.pack(len(payload)) + payload


def main() -> None:
    """Answer requests ``(name of scorer, response, reference)`` with ``(score, None)`` or ``(None, reason of the failure)``.

    The first frame in is the list of ScorerSpec; the first frame out is the reason why they cannot be built, or None.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the run decides what ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a scorer that prints must not write into the frames
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Reading in a thread lets the process end with the run even while a scorer loops for ever.
    threading.Thread(target=_read_frames, args=(sys.stdin.buffer, frames), daemon=True).start()
    try:
        specs: list[ScorerSpec] = pickle.loads(frames.get())
        scorers = {spec.name: build_scorer(spec) for spec in specs}
    except Exception as error:
        _write(answers, one_line(error))
        return
    _write(answers, None)
    while True:
        _write(answers, _score(scorers, frames.get()))


def checked_score(value: object) -> float:
    """A scorer's return value as a float; ValueError when it is not a finite number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"the scorer returned {value!r}, not a finite number")
    return float(value)


def _score(scorers: Mapping[str, Scorer], request: bytes) -> tuple[float | RuleScore, None] | tuple[None, str]:
    try:
        name, response, reference = pickle.loads(request)
        score = scorers[name](response, reference)
        return score if isinstance(score, RuleScore) else checked_score(score), None
    except Exception as error:
        return None, one_line(error)


def _read_frames(stream: BinaryIO, frames: "queue.SimpleQueue[bytes]") -> None:
    while header := stream.read(FRAME_LENGTH.size):
        frames.put(stream.read(*FRAME_LENGTH.unpack(header)))
    os._exit(0)


def _write(stream: BinaryIO, value: object) -> None:
    stream.write(pack_frame(value))
    stream.flush()
