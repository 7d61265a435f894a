"""Writing files that are larger than memory."""

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
        self._under_way: Future[None] | None = None
        self._written = 0
        self._flushed = 0

    def write(self, data: Any, /) -> int:
        """Write bytes; waits while too many are not on the disk."""
        count = super().write(data)
        self._written += count
        if self._written - self._flushed >= FLUSH_BYTES:
            self._wait()
            self._flushed = self._written
            self._under_way = self._flusher.submit(self._flush_to_disk)
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
        if self._under_way is not None:
            self._under_way.result()

    def _flush_to_disk(self) -> None:
        os.fsync(self.fileno())
        os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
