"""Write megatron-core's distributed checkpoints without holding the model: each chunk is read when it is written.

megatron-core's queue of write results is kept here too, by a process that costs little and ends with its rank.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megarl.death_signal import end_with_parent_alone
from megarl.weights.files.checkpoint_map import Fragment
from megarl.weights.files.partial_folder import PartialFolder
from megarl.weights.files.stored_tensors import Buffer, read_ahead, windows


@dataclass(frozen=True, slots=True)
class Window:
    """Rows ``start:stop`` of a fragment, which become one chunk of the checkpoint."""

    fragment: Fragment
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole chunk."""
        return torch.empty(self.fragment.box(self.start, self.stop)[1], dtype=self.dtype, device="meta").nbytes


def split_into_files(fragments: list[Fragment], dtypes: dict[str, torch.dtype], file_bytes: int) -> list[list[Window]]:
    """Split all fragments into windows, and these into files of about ``file_bytes``.

    Args:
        fragments: of the whole model.
        dtypes: of the checkpoint's tensors, by key.
    """
    files: list[list[Window]] = [[]]
    size = 0
    for fragment in fragments:
        dtype = dtypes[fragment.key]
        for start, stop in windows(fragment.shape, dtype):
            window = Window(fragment, start, stop, dtype)
            if files[-1] and size + window.num_bytes > file_bytes:
                files.append([])
                size = 0
            files[-1].append(window)
            size += window.num_bytes
    return files


class StreamingSave(TorchDistSaveShardedStrategy):
    """megatron-core's strategy for ``dist_checkpointing.save``, with tensors that are read window by window.

    Args:
        output: folder to write into; files that it knows as finished are not written again.
        files: the windows of each file.
        read: puts a window's values, in its dtype and with its shape in the checkpoint's tensor, into a buffer.
        progress: told the bytes of each window.
    """

    def __init__(
        self,
        output: PartialFolder,
        files: list[list[Window]],
        read: Callable[[Window, Buffer], Tensor],
        progress: Callable[[int], None],
    ) -> None:
        super().__init__("torch_dist", 1)
        self._output = output
        self._files = files
        self._read = read
        self._progress = progress

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Write the files and then torch.distributed.checkpoint's metadata."""
        objects = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedObject)]
        results = [*self._write_objects(objects, "__0_0.distcp")]
        for number, windows_of_file in enumerate(self._files, start=1):
            results += self._write_windows(windows_of_file, f"__0_{number}.distcp")
        state: dict[str, Any] = {item.unique_key: BytesStorageMetadata() for item in objects}
        for window in (window for file in self._files for window in file):
            fragment = window.fragment
            properties = TensorProperties(dtype=window.dtype)
            entry = state.setdefault(fragment.key, TensorStorageMetadata(properties, torch.Size(fragment.whole_shape), []))
            offsets, shape = fragment.box(window.start, window.stop)
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)))
        FileSystemWriter(checkpoint_dir).finish(Metadata(state), [results])

    def _write_objects(self, objects: list[ShardedObject], name: str) -> Iterator[WriteResult]:
        with (self._output.path / name).open("wb") as stream:
            for item in objects:
                start = stream.tell()
                stream.write(mcore_to_pyt_state_dict({item.unique_key: [item]})[item.unique_key].getbuffer())
                yield _result(MetadataIndex(item.unique_key), name, start, stream.tell() - start)

    def _write_windows(self, windows_of_file: list[Window], name: str) -> Iterator[WriteResult]:
        finished = self._output.finished(name)
        if finished is None:
            finished = {"archives": []}
            with self._output.write(name, finished) as stream:
                for tensor in read_ahead(self._read, windows_of_file):
                    start = stream.tell()
                    torch.save(tensor, stream)
                    finished["archives"].append([start, stream.tell() - start])
                    self._progress(tensor.nbytes)
        else:
            self._progress(sum(window.num_bytes for window in windows_of_file))
        for window, (start, length) in zip(windows_of_file, finished["archives"], strict=True):
            offsets, _ = window.fragment.box(window.start, window.stop)
            yield _result(MetadataIndex(window.fragment.key, offsets), name, start, length)


def _result(index: MetadataIndex, file: str, start: int, length: int) -> WriteResult:
    return WriteResult(index, length, _StorageInfo(file, start, length))


class BytesQueue:
    """A manager's queue that carries bytes: results have torch's classes, which the manager's process would import for seconds."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, result: Any) -> None:
        """Add one result to the queue."""
        self._queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        """Take the oldest result; queue.Empty when there is none."""
        return pickle.loads(self._queue.get_nowait())


def start_result_queue() -> None:
    """Start the queue, whose process ends with this rank even when that is killed."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(end_with_parent_alone)
        filesystem_async._results_queue = BytesQueue(manager.Queue())
