"""Reading megatron-core's distributed checkpoints (torch_dist) by boxes of tensors, in any layout they were saved from.

Such a folder is a torch.distributed.checkpoint: ``.metadata`` says for every chunk of every tensor which file has it where, as a
small ``torch.save`` archive. Nothing of it is trusted: of ``.metadata`` only the plain records below are unpickled, of the
archives and of ``common.pt`` only tensors and plain values (``weights_only``). megatron-core's own reader, which unpickles
whatever it finds, is not used anywhere.
"""

import io
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, TensorStorageMetadata

from megarl.errors import CheckpointError, shortened
from megarl.weights.files.stored_tensors import StoredTensor, read_into

METADATA = ".metadata"
MEGATRON_MARKER = "metadata.json"  # written last by megatron-core
COMMON = "common.pt"  # what is no tensor, of megatron-core before 0.19
COMMON_OBJECT = "common_state/shard_0_1"  # the same, since
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    RecursionError,
    pickle.UnpicklingError,
)
RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class _RecordUnpickler(pickle.Unpickler):
    """Unpickles the records of checkpoint metadata and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint metadata needs")
        return super().find_class(module, name)


def _enum_member(enum: object, name: str) -> Enum:
    """Allow what metadata may use getattr for: Python 3.11.0 to 3.11.3 write members of enums with it."""
    if not (isinstance(enum, EnumType) and name in enum.__members__):
        raise pickle.UnpicklingError(f"it asks for the attribute {name} of {enum!r}, which no checkpoint metadata needs")
    return enum.__members__[name]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor and the archive that holds it.

    Attributes:
        offsets: of its first element in the tensor.
        shape: of the part.
        dtype: of the tensor.
        path: file of the archive.
        start: of the archive in the file.
        length: of the archive in bytes.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of the checkpoint: its whole shape and the chunks it was saved in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class CheckpointObject:
    """An archive of values that are no tensors: ``length`` bytes from ``start`` on of a file."""

    path: Path
    start: int
    length: int


class DistributedCheckpoint:
    """One checkpoint folder.

    Args:
        folder: of ``.metadata``.
        keep_cached: leave what is read in the operating system's cache, for other ranks that read it too.

    Raises:
        CheckpointError: it is no such folder, it is damaged, or its metadata asks for more than records.
    """

    def __init__(self, folder: Path, *, keep_cached: bool = False) -> None:
        self.folder = folder
        self.tensors, self._objects = _read_metadata(folder)
        self._keep_cached = keep_cached
        self._stored: dict[Chunk, StoredTensor] = {}
        self._lock = threading.Lock()

    def read_object(self, key: str) -> Any:
        """Read the value that megatron-core saved as a ShardedObject of that unique key: tensors, numbers, texts, containers.

        Raises:
            CheckpointError: there is none, it is damaged, or it holds something else.
        """
        stored = self._objects.get(key)
        if stored is None:
            raise CheckpointError(f"{self.folder} lacks {key}; use another checkpoint")
        with _refused(stored.path, stored.start), stored.path.open("rb") as file:
            values = torch.load(
                io.BufferedReader(_Window(file, stored.start, stored.length)), map_location="cpu", weights_only=True
            )
            return values[0]

    def common_state(self) -> dict[str, Any]:
        """Read what was saved beside tensors and ShardedObjects, wherever this megatron-core keeps it; raises likewise."""
        path = self.folder / COMMON
        if COMMON_OBJECT in self._objects:
            state = self.read_object(COMMON_OBJECT)
        else:
            with _refused(path, 0):
                state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds no state of a run; use another checkpoint")
        return state

    def read_box(self, key: str, offsets: tuple[int, ...], target: Tensor) -> None:
        """Fill a contiguous CPU tensor from the box at ``offsets``, which has the target's shape and lies inside the tensor.

        Raises:
            CheckpointError: a chunk cannot be read, or none holds part of the box.
        """
        num_filled = 0
        for chunk in self.tensors[key].chunks:
            begin = [max(box, part) for box, part in zip(offsets, chunk.offsets, strict=True)]
            end = [
                min(box + size, part + length)
                for box, size, part, length in zip(offsets, target.shape, chunk.offsets, chunk.shape, strict=True)
            ]
            lengths = [stop - start for start, stop in zip(begin, end, strict=True)]
            if min(lengths, default=1) > 0:
                part = target
                for dim, length in enumerate(lengths):
                    part = part.narrow(dim, begin[dim] - offsets[dim], length)
                self._read_part(chunk, [start - part for start, part in zip(begin, chunk.offsets, strict=True)], part)
                num_filled += part.numel()
        if num_filled != target.numel():
            raise CheckpointError(f"{self.folder} lacks a part of {key}, which its metadata describes; save it again")

    def _read_part(self, chunk: Chunk, starts: list[int], target: Tensor) -> None:
        """Fill ``target`` from the box of its shape at ``starts`` of one chunk."""
        stored = self._locate(chunk)
        strides = torch.empty(chunk.shape, device="meta").stride()
        first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
        # elements from the first to the last of the box: exactly the box where that is contiguous in the chunk
        span = 1 + sum((length - 1) * stride for length, stride in zip(target.shape, strides, strict=True))
        offset = stored.offset + first * stored.dtype.itemsize
        if span == target.numel() and target.is_contiguous():
            read_into(stored.path, offset, target, keep_cached=self._keep_cached)
        else:
            elements = torch.empty(span, dtype=stored.dtype)
            read_into(stored.path, offset, elements, keep_cached=self._keep_cached)
            target.copy_(elements.as_strided(target.shape, strides))

    def _locate(self, chunk: Chunk) -> StoredTensor:
        """Find where in its archive the chunk's bytes are, without reading them."""
        with self._lock:
            if chunk not in self._stored:
                self._stored[chunk] = self._open_archive(chunk)
            return self._stored[chunk]

    def _open_archive(self, chunk: Chunk) -> StoredTensor:
        with _refused(chunk.path, chunk.start), chunk.path.open("rb") as file, FakeTensorMode():
            # a fake tensor has no data, but its storage knows where in the archive they are
            tensor = torch.load(io.BufferedReader(_Window(file, chunk.start, chunk.length)), map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (chunk.shape, chunk.dtype):
            raise CheckpointError(f"{chunk.path} is corrupt at {chunk.start}: it holds no {chunk.dtype} of {list(chunk.shape)}")
        position = int(tensor.untyped_storage()._checkpoint_offset or 0) + int(tensor.storage_offset()) * tensor.dtype.itemsize
        if not tensor.is_contiguous() or position + tensor.numel() * tensor.dtype.itemsize > chunk.length:
            raise CheckpointError(f"{chunk.path} is corrupt at {chunk.start}: its tensor does not fit into it")
        return StoredTensor(chunk.path, chunk.start + position, chunk.shape, tensor.dtype)


class _Window(io.RawIOBase):
    """Part of an open file, as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def is_distributed_checkpoint(folder: Path) -> bool:
    """Return whether megatron-core finished saving a checkpoint there."""
    return (folder / MEGATRON_MARKER).is_file() and (folder / METADATA).is_file()


@contextmanager
def _refused(path: Path, start: int) -> Iterator[None]:
    """Turn whatever an archive that is damaged, or holds more than plain values, raises into a CheckpointError."""
    try:
        yield
    except UNREADABLE as error:
        reason = shortened(str(error).partition("\n")[0] or type(error).__name__)
        raise CheckpointError(f"{path} is truncated or corrupt at {start} ({reason}); use another checkpoint") from error


def _read_metadata(folder: Path) -> tuple[dict[str, CheckpointTensor], dict[str, CheckpointObject]]:
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _RecordUnpickler(file).load()
        places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
        tensors = {
            key: CheckpointTensor(
                tuple(entry.size),
                entry.properties.dtype,
                tuple(_chunk(folder, entry, chunk, places[key, chunk.offsets]) for chunk in entry.chunks),
            )
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        objects = {
            key: _object(folder, places[key, None])
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata)
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give a folder that megatron-core saved") from error
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(
            f"{path} is not the metadata of a checkpoint ({shortened(str(error))}); use another checkpoint"
        ) from error
    _check_files([*(chunk for tensor in tensors.values() for chunk in tensor.chunks), *objects.values()])
    return tensors, objects


def _file(folder: Path, place: Any) -> Path:
    file = place.relative_path
    if Path(file).name != file or getattr(place, "transform_descriptors", None):
        raise ValueError(f"{file!r} is no plain file of the folder")
    return folder / file


def _chunk(folder: Path, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata, place: Any) -> Chunk:
    path = _file(folder, place)
    return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), entry.properties.dtype, path, place.offset, place.length)


def _object(folder: Path, place: Any) -> CheckpointObject:
    return CheckpointObject(_file(folder, place), place.offset, place.length)


def _check_files(parts: Sequence[Chunk | CheckpointObject]) -> None:
    """Notice missing and shortened files before anything is read."""
    ends: dict[Path, int] = {}
    for part in parts:
        ends[part.path] = max(ends.get(part.path, 0), part.start + part.length)
    for path, end in ends.items():
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; use another checkpoint")
        if path.stat().st_size < end:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes of at least {end}; use another checkpoint")
