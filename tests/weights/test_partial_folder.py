"""Files that go to the disk while they are written."""

import errno
import io
import os
import random
from pathlib import Path

import pytest

from megarl.weights.files import partial_folder
from megarl.weights.files.partial_folder import WriteThroughFile


@pytest.fixture(autouse=True)
def small_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_folder, "FLUSH_BYTES", 2**16)


def test_every_byte_arrives_in_order(tmp_path: Path) -> None:
    generator = random.Random(0)
    pieces = [generator.randbytes(generator.randrange(2**15)) for _ in range(200)]
    with WriteThroughFile(tmp_path / "file") as file, io.BufferedWriter(file) as stream:
        for piece in pieces:
            stream.write(piece)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_what_the_disk_refuses_is_raised_and_the_file_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    file = WriteThroughFile(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="the disk is broken"):
        for _ in range(4):
            file.write(bytes(2**16))
    with pytest.raises(OSError, match="the disk is broken"):
        file.close()
    assert file.closed
