"""Digests of whole files: taken where they were written, and compared where they are read."""

import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 8 * 2**20
NUM_READERS = 4  # threads of one rank; neither reading nor the digest holds Python's lock
SIDE_FILE = "digests_of_rank_{rank}.json"  # what a rank's writer process tells; gone when the manifest is written


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """Size of a file, and XXH3's 128 bits of its bytes in hexadecimal; None where only the size is known."""

    num_bytes: int
    xxh3_128: str | None


def digest_file(path: Path) -> FileDigest:
    """Read a whole file; raises OSError."""
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            num_bytes += count
    return FileDigest(num_bytes=num_bytes, xxh3_128=state.hexdigest())


def files_below(folder: Path) -> list[str]:
    """Paths of all files below a folder, in order."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()]


def share_of_rank(files: dict[str, FileDigest], rank: int, num_ranks: int) -> list[str]:
    """Return the files that a rank reads when all ranks share them: the largest first, each to who has least."""
    loads = [0] * num_ranks
    mine = []
    for name, entry in sorted(files.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += entry.num_bytes + 1
        if least == rank:
            mine.append(name)
    return mine


def find_damage(folder: Path, files: dict[str, FileDigest], names: Sequence[str]) -> list[str]:
    """Find what is wrong with these files, as sentences that begin with the file's path; in the order of ``names``."""
    with ThreadPoolExecutor(max_workers=NUM_READERS) as readers:
        return [problem for problem in readers.map(lambda name: _damage(folder / name, files[name]), names) if problem]


def size_damage(folder: Path, files: dict[str, FileDigest]) -> str:
    """Find the first file that is missing or has another size, as a sentence; empty when there is none. Reads no file."""
    return next((problem for name, entry in files.items() if (problem := _size_damage(folder / name, entry))), "")


def _size_damage(path: Path, expected: FileDigest) -> str:
    try:
        found = path.stat()
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is no file"
    if found.st_size != expected.num_bytes:
        return f"{path} has {found.st_size} bytes, the manifest says {expected.num_bytes}"
    return ""


def _damage(path: Path, expected: FileDigest) -> str:
    problem = _size_damage(path, expected)
    if problem or expected.xxh3_128 is None:
        return problem
    try:
        found = digest_file(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if found == expected:
        return ""
    return f"{path} is damaged: its bytes do not have the digest that the manifest says"


def write_and_digest(write: Callable[..., None], folder: Path, rank: int, *args: object, **kwargs: object) -> None:
    """Have megatron-core write a rank's files, then take their digests while their pages are still in memory.

    Args:
        write: megatron-core's function, called with the arguments that follow.
        folder: where it writes ``__<rank>_*.distcp``.
        rank: of this process, or of the rank that it writes for.
    """
    write(*args, **kwargs)
    digests = {path.name: digest_file(path) for path in sorted(folder.glob(f"__{rank}_*.distcp"))}
    values = {name: [entry.num_bytes, entry.xxh3_128] for name, entry in digests.items()}
    side_file = folder / SIDE_FILE.format(rank=rank)
    try:
        side_file.write_text(json.dumps(values))
    except OSError:  # the disk is full: the error comes from what megatron-core wrote, or rank 0 reads the files once more
        side_file.unlink(missing_ok=True)


def collect_digests(folder: Path) -> dict[str, FileDigest]:
    """Collect what ``write_and_digest`` of all ranks told, by file name; their side files are removed."""
    digests: dict[str, FileDigest] = {}
    for path in sorted(folder.iterdir()):
        if re.fullmatch(SIDE_FILE.format(rank=r"\d+"), path.name):
            values = json.loads(path.read_text())
            digests |= {name: FileDigest(num_bytes=count, xxh3_128=digest) for name, (count, digest) in values.items()}
            path.unlink()
    return digests


def sync_files(folder: Path) -> None:
    """Bring all files below a folder, and the folders themselves, to the disk."""
    for name in files_below(folder):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
