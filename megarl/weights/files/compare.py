"""Comparing two models on disk tensor by tensor, each however it is kept."""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.weights.files.model_folder import ModelFolder
from megarl.weights.files.shard_folder import ShardFolder
from megarl.weights.files.stored_tensors import Buffer, ReportBytes, TensorFolder, as_bytes, num_bytes, read_ahead, windows

PIECE = 2**20  # elements of which the differences are looked at together


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that differs and how."""

    name: str
    reason: str


class ComparedFolder:
    """One of the models: how many tensors it has, their bytes, and a digest of them."""

    def __init__(self) -> None:
        self.num_tensors = 0
        self.num_bytes = 0
        self._hash = hashlib.sha256()

    def add(self, tensors: TensorFolder, name: str, digest: str) -> None:
        """Count one tensor; names must come in order."""
        self.num_tensors += 1
        self.num_bytes += num_bytes(tensors, name)
        self._hash.update(f"{name} {tensors.dtypes[name]} {list(tensors.shapes[name])} {digest}\n".encode())

    @property
    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and SHA-256 of every tensor, by name: the same for the same weights however kept."""
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of ``compare``; ``ignored`` are tensors that the model does not take, such as a copy of tied embeddings."""

    first: ComparedFolder
    second: ComparedFolder
    differences: list[Difference]
    ignored: list[str]


def compare(first: ModelFolder, second: ModelFolder, *, cast: bool, progress: ReportBytes) -> Comparison:
    """Read both models once, window by window, and compare every tensor.

    Tensors are equal when names, shapes, dtypes and all bytes are; in shards also all copies of them.

    Args:
        cast: a tensor may have another dtype in ``second``, if its values are those of ``first`` cast to it.
        progress: told the bytes of ``first`` and ``second`` just read, and those of all.
    """
    a, b = first.tensors, second.tensors
    ignored = _ignored(first, second)
    names = sorted((a.shapes.keys() | b.shapes.keys()) - set(ignored))
    total = sum(num_bytes(side, name) for side in (a, b) for name in names if name in side.shapes)
    result = Comparison(ComparedFolder(), ComparedFolder(), [], ignored)
    left, right = (_pieces(folder, names, a, b) for folder in (a, b))
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name in names:
            reason = _metadata_difference(name, a, b, cast)
            hashes = (hashlib.sha256(), hashlib.sha256())
            gap = _Gap()
            for start, _ in _windows(name, a, b):
                mine, other = next(left), next(right)
                pieces = [(piece, digest) for piece, digest in zip((mine, other), hashes, strict=True) if piece is not None]
                hashing = [pool.submit(digest.update, as_bytes(piece)) for piece, digest in pieces]
                if reason is None and mine is not None and other is not None:
                    gap.compare(start, mine if mine.dtype == other.dtype else mine.to(other.dtype), other)
                wait(hashing)
                progress(sum(piece.nbytes for piece, _ in pieces), total)
            for folder, side, digest in zip((a, b), (result.first, result.second), hashes, strict=True):
                if name in folder.shapes:
                    side.add(folder, name, digest.hexdigest())
            if reason or gap.num_elements:
                result.differences.append(Difference(name, reason or gap.in_words()))
    for folder in (a, b):
        if isinstance(folder, ShardFolder):
            result.differences.extend(Difference(name, reason) for name, reason in folder.inconsistencies())
    return result


def _metadata_difference(name: str, a: TensorFolder, b: TensorFolder, cast: bool) -> str | None:
    """Return why the values of a tensor need not be looked at."""
    for one, other in ((a, b), (b, a)):
        if name not in other.shapes:
            return f"only in {one.folder}"
    if a.shapes[name] != b.shapes[name]:
        return f"shape {list(a.shapes[name])} against {list(b.shapes[name])}"
    if a.dtypes[name] != b.dtypes[name] and not cast:
        return f"dtype {a.dtypes[name]} against {b.dtypes[name]}"
    return None


def _windows(name: str, a: TensorFolder, b: TensorFolder) -> Iterator[tuple[int, int]]:
    """Return the row ranges in which a tensor is read from both sides: those of the side with more bytes."""
    folder = max((side for side in (a, b) if name in side.shapes), key=lambda side: num_bytes(side, name))
    return windows(folder.shapes[name], folder.dtypes[name])


def _pieces(folder: TensorFolder, names: list[str], a: TensorFolder, b: TensorFolder) -> Iterator[Tensor | None]:
    """Yield what one side has of each window of each tensor."""

    def read(item: tuple[str, int, int], buffer: Buffer) -> Tensor | None:
        name, start, stop = item
        if name not in folder.shapes:
            return None
        shape = folder.shapes[name]
        num_rows = max(0, min(stop, shape[0]) - start) if shape else 1
        target = buffer.tensor((num_rows, *shape[1:]), folder.dtypes[name])
        folder.read_rows(name, start, target)
        return target

    return read_ahead(read, ((name, *window) for name in names for window in _windows(name, a, b)))


def _ignored(first: ModelFolder, second: ModelFolder) -> list[str]:
    """Return the names that only a Hugging Face side has and that the Megatron model on the other side rightly has not."""
    ignored: set[str] = set()
    for one, other in ((first, second), (second, first)):
        if other.weight_map is not None:
            extra = one.tensors.shapes.keys() - other.tensors.shapes.keys()
            ignored |= extra - other.weight_map.unknown(extra)
    return sorted(ignored)


class _Gap:
    """Where and by how much two tensors differ."""

    def __init__(self) -> None:
        self.num_elements = 0
        self.largest = 0.0
        self.first = ""

    def compare(self, start: int, left: Tensor, right: Tensor) -> None:
        """Count the elements of one window, whose first row is ``start``, that differ in their bits."""
        if torch.equal(_bits(left), _bits(right)):
            return
        at = 0
        for mine, other in zip(left.flatten().split(PIECE), right.flatten().split(PIECE), strict=True):
            differs = _bits(mine) != _bits(other)
            if differs.any():
                self.num_elements += int(differs.sum())
                gaps = (mine.double() - other.double()).abs()
                self.largest = max(self.largest, float(gaps.nan_to_num(nan=math.inf).max()))
                if not self.first:
                    first = int(differs.view(torch.uint8).argmax())
                    row, *index = (int(number) for number in torch.unravel_index(torch.tensor(at + first), left.shape))
                    self.first = f"first at {[start + row, *index]}: {mine[first].item():.6g} against {other[first].item():.6g}"
            at += len(mine)

    def in_words(self) -> str:
        """Say the difference in one line."""
        return f"{self.num_elements} elements differ, by up to {self.largest:.3g}; {self.first}"


def _bits(tensor: Tensor) -> Tensor:
    """Return the same elements as integers, so that equal NaNs are equal and the zeros are not."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.dtype.itemsize])
