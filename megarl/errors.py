"""Every error a user can cause or meet. The command line prints one as one line and exits with status 2."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MESSAGE_LENGTH = 300  # characters of a message, at most
REMOVED = "***"  # stands for a secret
_URL_PASSWORD = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s'\"]*@")
_URL_KEY = re.compile(r"([?&][\w-]*(?:key|token|secret|password|signature)=)[^&\s#'\"]+", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:api[_-]?key|secret|password|passwd|passphrase|(?:access|auth|hf)[_-]?token)(?:\.\w+)*['\"]?"
    r"(?:\s*[=:]\s*['\"]?|\s+is\s+['\"]))[^\s'\",;}]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bBearer\s+)[^\s'\",;]+")


def without_secrets(text: str) -> str:
    """The text with ``***`` for passwords and keys in URLs, and for values that are called keys or passwords."""
    for pattern, replacement in (
        (_URL_PASSWORD, rf"\g<1>{REMOVED}@"),
        *((one, rf"\g<1>{REMOVED}") for one in (_URL_KEY, _NAMED, _BEARER)),
    ):
        text = pattern.sub(replacement, text)
    return text


class MegaRLError(Exception):
    """Base of all errors that carry a message for the user: the value, the reason and the fix."""


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


def listed(names: list[str], limit: int = 5) -> str:
    """The first names and how many more there are, for error messages."""
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


def one_line(error: BaseException) -> str:
    """The error's type and message on one line, cut when it is long."""
    return shortened(f"{type(error).__name__}: {error}", 200)


def with_fix(problem: str, fix: str) -> str:
    """A whole message: the problem, cut where both would not fit into one line, and what to do."""
    return f"{shortened(problem, MESSAGE_LENGTH - len(fix) - 2)}; {fix}"


def shortened(text: str, limit: int = 120) -> str:
    """A text of others as it fits into an error of one line: without characters that a terminal acts on, cut to ``limit``."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in without_secrets(text[: 20 * limit])).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(value: object, limit: int = 60) -> str:
    """The value as Python writes it, without control characters, shortened in its middle, for error messages."""
    text = repr(value[: 2 * limit] + value[-limit:] if isinstance(value, str) and len(value) > 4 * limit else value)
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[-(limit // 3) :]}"
