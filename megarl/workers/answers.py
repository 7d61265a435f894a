"""What the trainer reads from a worker, none of which it believes."""

import json
import secrets
from typing import Any

MAX_BYTES = 64 * 2**20  # of one answer
_MAX_REASON = 200  # characters of what a worker says, in one line


class BrokenAnswer(Exception):
    """A worker wrote something else than an answer to its request; the message says what."""


class Failure(Exception):
    """The answering function raised; the message is the reason."""


def new_token() -> str:
    """Make what the answer to one request must repeat: nothing written before the request can be taken for its answer."""
    return secrets.token_hex(8)


def check_length(length: int) -> int:
    """Return the length of a frame; BrokenAnswer when it is too much."""
    if length > MAX_BYTES:
        raise BrokenAnswer(f"its worker process answered with {length} bytes, above {MAX_BYTES}")
    return length


def unpack_answer(payload: bytes, token: str) -> Any:
    """Read the answer in a frame: numbers, texts, lists and mappings of what JSON has.

    Raises:
        Failure: it says why there is none.
        BrokenAnswer: it is no answer to this request.
    """
    try:
        reply = json.loads(payload)
        is_answer = reply["token"] == token and reply.keys() & {"answer", "failure"}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        is_answer = False
    if not is_answer:
        raise BrokenAnswer("its worker process wrote something else than an answer")
    if "failure" in reply:
        raise Failure(clean(str(reply["failure"])))
    return reply["answer"]


def clean(text: str) -> str:
    """Put a worker's words on one line of printable characters, shortened."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 1] + "…"
