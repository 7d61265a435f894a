"""Tensors that lie contiguously in files: where they are, and reading rows of them.

Files are read by position, never mapped: pages of a mapping count as memory of the process, and a model has more of them than a
machine has memory. For the same reason what was read does not stay in the page cache, unless the caller wants it to.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megarl.errors import WeightsError

WINDOW_BYTES = 64 * 2**20  # what is read and written at once
READ_AHEAD = 2  # windows that are read while one is written

ReportBytes = Callable[[int, int], None]  # told the bytes just done and the bytes of all
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A contiguous tensor in a file.

    Attributes:
        path: the file.
        offset: of its first byte.
        shape: of the tensor.
        dtype: of the tensor.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Length in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFolder(Protocol):
    """Whole Hugging Face tensors, however the folder keeps them."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill a contiguous CPU tensor of the same dtype with as many rows as it has, from row ``start`` on."""


def num_rows(shape: tuple[int, ...]) -> int:
    """Return the length of dim 0."""
    return shape[0] if shape else 1


def num_bytes(folder: TensorFolder, name: str) -> int:
    """Return the bytes of one tensor."""
    return math.prod(folder.shapes[name]) * folder.dtypes[name].itemsize


def windows(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Return the row ranges of about ``WINDOW_BYTES`` that cover a tensor; at least one, also of an empty tensor."""
    rows = num_rows(shape)
    step = max(1, WINDOW_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


def read_stored_rows(stored: StoredTensor, start: int, target: Tensor, *, keep_cached: bool = False) -> None:
    """Fill a contiguous CPU tensor of the same dtype with as many rows as it has, from row ``start`` on.

    Args:
        keep_cached: leave the pages in the operating system's cache, for other processes that read them too.
    """
    offset = stored.offset + start * math.prod(stored.shape[1:]) * stored.dtype.itemsize
    read_into(stored.path, offset, target, keep_cached=keep_cached)


def read_columns(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Read columns ``start:stop`` of a matrix, and no other bytes; the pages, which hold other columns too, stay cached."""
    num_columns = stored.shape[1]
    columns = torch.empty((stored.shape[0], stop - start), dtype=stored.dtype)
    if (start, stop) == (0, num_columns):
        read_stored_rows(stored, 0, columns, keep_cached=True)
        return columns
    with _opened(stored.path) as descriptor:
        for row, target in enumerate(columns):
            _fill(stored.path, descriptor, stored.offset + (row * num_columns + start) * stored.dtype.itemsize, target)
    return columns


def read_into(path: Path, offset: int, target: Tensor, *, keep_cached: bool = False) -> None:
    """Fill a contiguous CPU tensor with the bytes at ``offset``.

    Raises:
        WeightsError: the file cannot be read or ends before.
    """
    with _opened(path) as descriptor:
        _fill(path, descriptor, offset, target)
        if not keep_cached:
            os.posix_fadvise(descriptor, offset, target.nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error


def _fill(path: Path, descriptor: int, offset: int, target: Tensor) -> None:
    buffer = as_bytes(target)
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise WeightsError(f"{path} is truncated: {len(buffer)} bytes are missing at {offset}; copy it again")
        buffer, offset = buffer[count:], offset + count


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not a copy of them."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def check_finite(values: Tensor, name: str, folder: Path) -> None:
    """Refuse weights with NaN or infinite numbers in them.

    Raises:
        WeightsError: naming the tensor.
    """
    if not values.is_floating_point() or values.numel() == 0:
        return
    low, high = (values if values.element_size() > 1 else values.float()).aminmax()  # one pass; a NaN is both
    if not bool(low.isfinite() & high.isfinite()):
        raise WeightsError(f"{folder}: {name} holds NaN or infinite numbers; give a model whose weights are all finite")


class Buffer:
    """Memory that one tensor after another is read into: touching fresh memory takes longer than the reading."""

    def __init__(self) -> None:
        self._bytes = bytearray(WINDOW_BYTES)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an undefined tensor in the buffer, or elsewhere when it does not fit; its storage is no larger than itself."""
        count = math.prod(shape)
        if not 0 < count * dtype.itemsize <= WINDOW_BYTES:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count).view(shape)


def read_ahead(read: Callable[[Item, Buffer], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply ``read`` to each item, in order, in a thread that is ``READ_AHEAD`` items ahead.

    Args:
        read: gets an item and a buffer for the result, which is used again when the result after this one is asked for.
    """
    free = [Buffer() for _ in range(READ_AHEAD + 2)]
    pending: deque[tuple[Future[Result], Buffer]] = deque()

    def finished() -> Iterator[Result]:
        result, buffer = pending.popleft()
        yield result.result()
        free.append(buffer)

    with ThreadPoolExecutor(max_workers=1) as reader:
        for item in items:
            buffer = free.pop()
            pending.append((reader.submit(read, item, buffer), buffer))
            if len(pending) > READ_AHEAD:
                yield from finished()
        while pending:
            yield from finished()
