"""Hugging Face folders to Megatron checkpoints and back, window by window, without holding the model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megarl.errors import WeightsError
from megarl.parallel.launch import single_rank_world
from megarl.weights.distributed_writer import StreamingSave, Window, split_into_files
from megarl.weights.export import copy_side_files, set_dtype, shard_name, write_index
from megarl.weights.files.checkpoint_map import CheckpointMap, overlap
from megarl.weights.files.model_folder import PAD_MULTIPLE, FolderKind, folder_kind, open_megatron, readable_architecture
from megarl.weights.files.partial_folder import PartialFolder
from megarl.weights.files.safetensors_files import SafetensorsFolder, write_safetensors
from megarl.weights.files.sources import check_tensors
from megarl.weights.files.stored_tensors import Buffer, ReportBytes, TensorFolder, check_finite, read_ahead, windows
from megarl.weights.mapping import WeightMap


@dataclass(frozen=True, slots=True)
class Options:
    """What the conversions have in common.

    Attributes:
        dtype: what floating-point weights are cast to; None keeps each as it is. Buffers that are float32 in every model stay so.
        file_bytes: about how large each file gets.
    """

    dtype: torch.dtype | None
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a conversion wrote: Hugging Face tensors, bytes, and one line for each kind of tensors that were left out."""

    num_tensors: int
    num_bytes: int
    notices: tuple[str, ...] = ()


def hugging_face_to_megatron(source: Path, output: Path, options: Options, progress: ReportBytes) -> Written:
    """Write a torch_dist checkpoint, which any layout loads, with the config and tokenizer files.

    Raises:
        MegaRLError: the input is damaged or of an unknown family, or the output cannot be written.
    """
    architecture = readable_architecture(source)
    if (kind := folder_kind(source)) is not FolderKind.HUGGING_FACE:
        raise WeightsError(f"{source} holds {kind.value}; give a Hugging Face model")
    tensors = SafetensorsFolder(source)
    with single_rank_world():
        checkpoint_map = CheckpointMap(architecture, PAD_MULTIPLE)
        check_tensors(tensors, checkpoint_map.weight_map)
        fragments = list(checkpoint_map.fragments.values())
        dtypes = _checkpoint_dtypes(checkpoint_map, tensors, options.dtype)
        files = split_into_files(fragments, dtypes, options.file_bytes)
        total = sum(window.num_bytes for file in files for window in file)
        rows_of = {fragment.parameter: checkpoint_map.hugging_face_rows(fragment.parameter) for fragment in fragments}

        def read(window: Window, buffer: Buffer) -> Tensor:
            first, num_rows = window.fragment.start + window.start, window.stop - window.start
            target = buffer.tensor((num_rows, *window.fragment.shape[1:]), window.dtype)
            for at, (name, start, stop) in overlap(rows_of[window.fragment.parameter], first, first + num_rows):
                if name is None:
                    target[at : at + stop - start].zero_()
                else:
                    read_cast(tensors, name, start, target[at : at + stop - start])
            return target.view(window.fragment.box(window.start, window.stop)[1])

        with PartialFolder(output, purpose("Hugging Face to Megatron", source, source, options)) as partial:
            partial.check_space(total)
            with partial.errors():
                copy_side_files(source, source, partial.path)
                set_dtype(partial.path, options.dtype)
                strategy = StreamingSave(partial, files, read, lambda done: progress(done, total))
                dist_checkpointing.save(checkpoint_map.sharded_state, str(partial.path), strategy)
            partial.publish()
    weight_map = checkpoint_map.weight_map
    return Written(len(weight_map.hugging_face_shapes()), total, tuple(weight_map.notices(tensors.shapes)))


def _checkpoint_dtypes(
    checkpoint_map: CheckpointMap, tensors: SafetensorsFolder, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the dtype of each of the checkpoint's tensors, which may hold the weights of many layers."""
    found: dict[str, tuple[torch.dtype, str]] = {}
    for fragment in checkpoint_map.fragments.values():
        for name in checkpoint_map.weight_map.parameters[fragment.parameter].hugging_face:
            target = target_dtype(checkpoint_map.weight_map, fragment.parameter, tensors.dtypes[name], dtype)
            known, other = found.setdefault(fragment.key, (target, name))
            if known != target:
                raise WeightsError(
                    f"{tensors.folder}: {other} is {known} and {name} is {target}, "
                    "but Megatron keeps them in one tensor; give --dtype"
                )
    return {key: target for key, (target, _) in found.items()}


def target_dtype(weight_map: WeightMap, parameter: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return what a Megatron parameter's tensor of dtype ``stored`` is cast to."""
    if dtype is None or not stored.is_floating_point or weight_map.parameters[parameter].is_buffer:
        return stored
    return dtype


def megatron_to_hugging_face(
    checkpoint: Path, output: Path, config: Path | None, options: Options, progress: ReportBytes
) -> Written:
    """Write safetensors files with their index, and the config and tokenizer files.

    Args:
        checkpoint: a converted folder, a run's ``checkpoints/step_…``, or any torch_dist folder.
        config: folder of config.json and tokenizer, where the checkpoint has none.

    Raises:
        MegaRLError: the input is damaged or of another model, or the output cannot be written.
    """
    model = open_megatron(checkpoint, config)
    assert model.config is not None and model.tokenizer is not None and model.weight_map is not None
    tensors = model.tensors
    owners = {name: parameter.megatron for parameter in model.weight_map.parameters.values() for name in parameter.hugging_face}
    dtypes = {name: target_dtype(model.weight_map, owners[name], tensors.dtypes[name], options.dtype) for name in tensors.shapes}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in tensors.shapes.items()}
    files = split_names(sizes, dtypes, options.file_bytes)
    total = sum(sizes.values())
    with PartialFolder(output, purpose("Megatron to Hugging Face", tensors.folder, model.config, options)) as partial:
        partial.check_space(total)
        for number, names in enumerate(files, start=1):
            described = {name: (tensors.shapes[name], dtypes[name]) for name in names}
            pieces = _pieces(tensors, names, dtypes)
            write_file(partial, shard_name(number, len(files)), described, pieces, lambda done: progress(done, total))
        with partial.errors():
            copy_side_files(model.config, model.tokenizer, partial.path)
            set_dtype(partial.path, dtypes[next(iter(tensors.shapes))])
            write_index(partial.path, files, total)
        partial.publish()
    return Written(len(sizes), total)


def split_names(sizes: dict[str, int], dtypes: dict[str, torch.dtype], file_bytes: int) -> list[list[str]]:
    """Distribute tensors over files of about ``file_bytes``, in order.

    Args:
        sizes: bytes of each tensor.
        dtypes: of each tensor.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    # the widest dtypes first, so that every tensor is aligned
    return [sorted(names, key=lambda name: -dtypes[name].itemsize) for names in files]


def _pieces(tensors: TensorFolder, names: list[str], dtypes: dict[str, torch.dtype]) -> Iterator[Tensor]:
    def read(piece: tuple[str, int, int], buffer: Buffer) -> Tensor:
        name, start, stop = piece
        target = buffer.tensor((stop - start, *tensors.shapes[name][1:]), dtypes[name])
        read_cast(tensors, name, start, target)
        return target

    return read_ahead(read, ((name, *window) for name in names for window in windows(tensors.shapes[name], dtypes[name])))


def read_cast(tensors: TensorFolder, name: str, start: int, target: Tensor) -> None:
    """Fill ``target``, of any dtype, with rows of a tensor."""
    stored = tensors.dtypes[name]
    if stored == target.dtype:
        tensors.read_rows(name, start, target)
    else:
        values = torch.empty(target.shape, dtype=stored)
        tensors.read_rows(name, start, values)
        target.copy_(values)
    check_finite(target, name, tensors.folder)


def write_file(
    partial: PartialFolder,
    file: str,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    pieces: Iterator[Tensor],
    progress: Callable[[int], None],
) -> None:
    """Write one safetensors file, unless an earlier try finished it.

    Args:
        file: its name.
        tensors: name to shape and dtype.
        pieces: as ``write_safetensors`` takes them; not asked for when the file is finished.
        progress: told the bytes just done.
    """
    if partial.finished(file):
        progress(sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values()))
        return

    def told(piece: Tensor) -> Tensor:
        progress(piece.nbytes)
        return piece

    with partial.write(file, {}) as stream:
        write_safetensors(stream, tensors, map(told, pieces))


def purpose(conversion: str, source: Path, config: Path, options: Options) -> dict[str, Any]:
    """Return what must be the same for an unfinished conversion to be continued.

    Args:
        conversion: what kind.
        source: folder of the weights.
        config: folder of config.json.
    """
    files = {path for folder in (source, config) for path in folder.iterdir() if path.is_file()}
    return {
        "conversion": conversion,
        "input": str(source.absolute()),
        "state of the input's files": {
            str(path.absolute()): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)
        },
        "dtype": str(options.dtype),
        "file size": options.file_bytes,
        "torch version": torch.__version__,
        "megatron-core version": version("megatron-core"),
    }
