"""Every error a user can cause or meet. The command line prints one as one line and exits with status 2."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MESSAGE_LENGTH = 300  # characters of a message, at most
_SHORT_WORD = 48  # characters; a word that long may be a path whose end matters, and longer ones are cut first
_GAP = "..."
REMOVED = "***"  # stands for a secret
_URL_PASSWORD = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s'\"]*@")
_URL_KEY = re.compile(r"([?&][\w-]*(?:key|token|secret|password|signature)=)[^&\s#'\"]+", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:api[_-]?key|secret|password|passwd|passphrase|(?:access|auth|hf)[_-]?token)(?:\.\w+)*['\"]?"
    r"(?:\s*[=:]\s*['\"]?|\s+is\s+['\"]))[^\s'\",;}]{4,}",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bBearer\s+)[^\s'\",;]+")


def without_secrets(text: str) -> str:
    """Return the text with ``***`` for passwords and keys in URLs, and for values that are called keys or passwords."""
    for pattern, replacement in (
        (_URL_PASSWORD, rf"\g<1>{REMOVED}@"),
        *((one, rf"\g<1>{REMOVED}") for one in (_URL_KEY, _NAMED, _BEARER)),
    ):
        text = pattern.sub(replacement, text)
    return text


class MegaRLError(Exception):
    """Base of all errors that carry a message for the user: the value, the reason and the fix.

    Args:
        mistakes: usually one; where several things are wrong at once, one text for each.
    """

    def __init__(self, *mistakes: str) -> None:
        super().__init__(*mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n".join(map(str, self.mistakes))


class ConfigError(MegaRLError):
    """A configuration key or value is wrong, or two of them cannot go together."""


class DataError(MegaRLError):
    """A dataset is missing, empty or has a malformed row."""


class WeightsError(MegaRLError):
    """Model weights are missing, truncated, mis-shaped or belong to another model."""


class TransferError(MegaRLError):
    """Weights could not be moved between ranks: one died or was too slow, or bytes arrived changed."""


class CheckpointError(MegaRLError):
    """A checkpoint is incomplete, belongs to another model, or could not be written."""


class RolloutError(MegaRLError):
    """A rollout engine could not start, died, or did not answer in time."""


class RewardError(MegaRLError):
    """A scorer failed and the configured policy is to stop."""


class FileError(MegaRLError):
    """A file of the run cannot be written, for example because the disk is full."""


class RunStopped(MegaRLError):
    """A signal asked the run to end; it saved a checkpoint and ended. The command's exit status is 75 (EX_TEMPFAIL)."""


class TrainingError(MegaRLError):
    """Training cannot go on, for example after too many skipped steps."""


class RankError(MegaRLError):
    """A rank of the run was killed, hangs, or failed in a way that no other error describes."""


def listed(names: list[str], limit: int = 5) -> str:
    """List the first names and how many more there are, for error messages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """Raise FileError, naming the path, where the system refuses what is written in the block."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path} cannot be written ({reason}); free some space there or choose another --run-dir") from error


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the error's type and message on one line, cut when it is long."""
    return shortened(f"{type(error).__name__}: {error}", limit)


def with_fix(problem: str, fix: str) -> str:
    """Write a whole message: the problem, cut where both would not fit into one line, and what to do."""
    return f"{shortened(problem, MESSAGE_LENGTH - len(fix) - 2)}; {fix}"


def shortened(text: str, limit: int = 120) -> str:
    """Shorten a text of others for an error of one line: without characters that a terminal acts on, cut to ``limit``."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in without_secrets(text[: 20 * limit])).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(value: object, limit: int = 60) -> str:
    """Write the value as Python does, without control characters, shortened in its middle, for error messages."""
    text = repr(value[: 2 * limit] + value[-limit:] if isinstance(value, str) and len(value) > 4 * limit else value)
    return cut(escaped(text), limit)


def escaped(text: str) -> str:
    r"""Return the text with ``\x1b`` and the like for what moves a cursor, colours, turns direction or cannot be encoded."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def cut(text: str, limit: int) -> str:
    """Cut out the middle of a text that is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    end = (limit - len(_GAP)) // 2
    return f"{text[: limit - len(_GAP) - end]}{_GAP}{text[len(text) - end :]}"


def fitted(text: str, limit: int = MESSAGE_LENGTH) -> str:
    """Fit a message into one printable line of at most ``limit`` characters, without secrets.

    Its longest words, which are paths, addresses and values, lose their middle first, so that the reason and the fix stay.
    """
    text = escaped(without_secrets(text))
    if len(text) <= limit:
        return text
    parts = re.split(r"( +)", text)
    for index in sorted(range(len(parts)), key=lambda index: -len(parts[index])):
        excess = sum(map(len, parts)) - limit
        if excess <= 0 or len(parts[index]) <= _SHORT_WORD:
            break
        parts[index] = cut(parts[index], max(_SHORT_WORD, len(parts[index]) - excess))
    return cut("".join(parts), limit)
