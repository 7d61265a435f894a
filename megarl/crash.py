"""Where the traceback of a failure goes that nobody foresaw: a file, so that people see one line. Imports no torch."""

import os
import tempfile
import time
import traceback
from pathlib import Path


def write_crash(error: BaseException, folder: Path | None = None, name: str = "crash.log") -> Path:
    """Write an error's traceback to a file and give its path.

    Args:
        error: what was raised.
        folder: of the run; where there is none, or it cannot be written, the system's temporary folder is taken.
        name: of the file in the run's folder; an earlier file of this name is added to.
    """
    text = "".join(traceback.format_exception(error))
    return append_crash(f"{text}\n", folder, name)


def append_crash(text: str, folder: Path | None, name: str) -> Path:
    """Write a text to the file of a failure, as ``write_crash`` does, and give its path."""
    heading = f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}\n"
    if folder is not None:
        try:
            with (folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(heading + text)
            return folder / name
        except OSError:
            pass  # a full disk may be the very failure
    handle, path = tempfile.mkstemp(prefix="megarl-crash-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(heading + text)
    return Path(path)


def where(error: BaseException) -> str:
    """Return the file and line that raised the error, e.g. ``loss.py:12``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
