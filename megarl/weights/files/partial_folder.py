"""A folder that appears under its name only when it is whole, and whose making can be continued after it was interrupted."""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from megarl.errors import WeightsError

JOURNAL = "unfinished.jsonl"  # first line: what is being made; then one line per finished file
FLUSH_BYTES = 128 * 2**20  # what may wait to be brought to the disk while as much is on its way there


class WriteThroughFile(io.FileIO):
    """A new file whose bytes go to the disk while more are written, and do not stay in the page cache.

    Closing it waits for the disk. So there is never more than twice ``FLUSH_BYTES`` to wait for, and the memory of pages that were
    just written serves the next ones.

    Raises:
        OSError: the disk refuses, when writing or when closing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._in_flight: Future[None] | None = None
        self._written = 0
        self._flushed = 0

    def write(self, data: Any, /) -> int:
        """Write bytes; waits while too many are not on the disk."""
        count = super().write(data)
        self._written += count
        if self._written - self._flushed >= FLUSH_BYTES:
            self._wait()
            self._flushed = self._written
            self._in_flight = self._flusher.submit(self._flush_to_disk)
        return count

    def close(self) -> None:
        """Wait until everything is on the disk."""
        if self.closed:
            return
        try:
            self._wait()
            self._flush_to_disk()
        finally:
            self._flusher.shutdown()
            super().close()

    def _wait(self) -> None:
        if self._in_flight is not None:
            self._in_flight.result()

    def _flush_to_disk(self) -> None:
        os.fsync(self.fileno())
        os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PartialFolder:
    """``OUTPUT.partial`` until it is renamed to ``OUTPUT``. To be used in a ``with`` statement, which keeps other writers out.

    Args:
        output: the folder to make; it must not exist, or be empty.
        purpose: what is made of what, JSON values; only a folder with the same purpose is continued.

    Raises:
        WeightsError: the output exists, cannot be written, or holds something else unfinished.
    """

    def __init__(self, output: Path, purpose: dict[str, object]) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self._finished: dict[str, dict[str, Any]] = {}
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise WeightsError(f"{output} exists and is not an empty folder; choose another output or remove it")
        with self.errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = (self.path / JOURNAL).open("ab+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise WeightsError(f"another process writes {self.path}; wait for it or choose another output") from error
        try:
            self._continue(purpose)
        except WeightsError:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()

    def _continue(self, purpose: dict[str, object]) -> None:
        self._journal.seek(0)
        text = self._journal.read()
        whole = text.rfind(b"\n") + 1  # a killed process may leave half a line
        lines = [json.loads(line) for line in text[:whole].splitlines()]
        with self.errors():
            self._journal.truncate(whole)
            if not lines:
                self._record(purpose)
                return
        for key in purpose | lines[0]:
            if lines[0].get(key) != purpose.get(key):
                raise WeightsError(
                    f"{self.path} holds an unfinished conversion with another {key}; remove it, or repeat that conversion"
                )
        for line in lines[1:]:
            file = self.path / line["file"]
            if file.exists() and file.stat().st_size == line["bytes"]:
                self._finished[line["file"]] = line

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return what ``write`` was told of a file that is whole, with ``file`` and ``bytes``; None for one that is not."""
        return self._finished.get(name)

    def check_space(self, num_bytes: int) -> None:
        """Refuse to start what cannot fit.

        Raises:
            WeightsError: less than ``num_bytes``, without the files that are finished, are free.
        """
        needed = num_bytes - sum(line["bytes"] for line in self._finished.values())
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise WeightsError(
                f"cannot write {self.output}: it needs {needed / 1e9:.2f} GB and {self.path.parent} has {free / 1e9:.2f} GB free; "
                "free some space or choose another disk"
            )

    @contextmanager
    def write(self, name: str, facts: dict[str, object]) -> Iterator[BinaryIO]:
        """Write one file; when the block ends it is on the disk under its name, and known to whoever continues.

        Args:
            name: of the file.
            facts: what else to record of it, JSON values; the block may fill it.
        """
        temporary = self.path / (name + ".writing")
        with self.errors():
            with WriteThroughFile(temporary) as file, io.BufferedWriter(file) as stream:
                yield stream
            size = temporary.stat().st_size
            os.replace(temporary, self.path / name)
            self._record({"file": name, "bytes": size} | facts)

    def publish(self) -> None:
        """Give the whole folder its name."""
        with self.errors():
            for path in self.path.rglob("*"):
                if path.is_file():
                    _synchronise(path)
            (self.path / JOURNAL).unlink()
            _synchronise(self.path)
            os.rename(self.path, self.output)
            _synchronise(self.output.parent)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the disk refuses into a WeightsError of one line."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch.save closes its archive after a failed write, fails again, and so hides the reason in the context
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise WeightsError(
                f"cannot write {self.output}: {reason}; what is finished stays in {self.path}, the same command continues it"
            ) from error

    def _record(self, line: dict[str, object]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _synchronise(path: Path) -> None:
    """Have a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
