"""Every error a user can cause or meet. The command line prints one as one line and exits with status 2."""

MESSAGE_LENGTH = 300  # characters of a message, at most


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


class TrainingError(MegaRLError):
    """Training cannot go on, for example after too many skipped steps."""


def listed(names: list[str], limit: int = 5) -> str:
    """The first names and how many more there are, for error messages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def one_line(error: BaseException) -> str:
    """The error's type and message on one line, cut when it is long."""
    return shortened(f"{type(error).__name__}: {error}", 200)


def with_fix(problem: str, fix: str) -> str:
    """A whole message: the problem, cut where both would not fit into one line, and what to do."""
    return f"{shortened(problem, MESSAGE_LENGTH - len(fix) - 2)}; {fix}"


def shortened(text: str, limit: int = 120) -> str:
    """A text of others as it fits into an error of one line: without characters that a terminal acts on, cut to ``limit``."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 20 * limit]).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(value: object, limit: int = 60) -> str:
    """The value as Python writes it, without control characters, shortened in its middle, for error messages."""
    text = repr(value[: 2 * limit] + value[-limit:] if isinstance(value, str) and len(value) > 4 * limit else value)
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[-(limit // 3) :]}"
