"""Where a distributed checkpoint keeps each row of each Hugging Face tensor.

The keys, shapes and offsets are megatron-core's own: the whole model is built without storage, and its sharded state dict says
which rows of which parameter go where. The weight map says which Hugging Face rows those are. As one rank holds the whole
model, every parameter is whole Hugging Face rows after one another.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories
from torch import Tensor

from megarl.config.schema import ModelConfig, RoleConfig
from megarl.errors import CheckpointError, WeightsError, listed
from megarl.families.base.architecture import Architecture
from megarl.models.build import build_model_on_meta
from megarl.parallel.layout import build_layout
from megarl.weights.distributed_checkpoint import DistributedCheckpoint
from megarl.weights.mapping import build_weight_map
from megarl.weights.transfer import global_parameters

Rows = tuple[str | None, int, int]  # rows start:stop of a Hugging Face tensor; of no tensor: zeros


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows of a Megatron parameter that lie together in a tensor of the checkpoint.

    Attributes:
        key: the tensor of the checkpoint.
        whole_shape: its shape.
        offsets: of the fragment's first element in it.
        shape: of the fragment, with as many dimensions as the parameter; the tensor may have more in front.
        parameter: the Megatron parameter.
        start: first row of it.
        is_padded: how many rows the tensor has depends on the layout that saved it (vocabulary).
    """

    key: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    parameter: str
    start: int
    is_padded: bool

    def box(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the offsets and shape in the checkpoint's tensor of the fragment's rows ``start:stop``."""
        in_front = len(self.whole_shape) - len(self.shape)
        offsets = (*self.offsets[:in_front], self.offsets[in_front] + start, *self.offsets[in_front + 1 :])
        return offsets, (*(1 for _ in range(in_front)), stop - start, *self.shape[1:])


class CheckpointMap:
    """All fragments of a model. Must be made where a world of one rank exists.

    Args:
        architecture: the model.
        pad_multiple: of the vocabulary.

    Attributes:
        weight_map: of the model.
        sharded_state: megatron-core's sharded state dict; its tensors have no storage.
        fragments: of every parameter, by key and offsets.
    """

    def __init__(self, architecture: Architecture, pad_multiple: int) -> None:
        self.weight_map = build_weight_map(architecture, pad_multiple, with_transformer_engine=False)
        layout = build_layout(RoleConfig().parallel)
        model_config = ModelConfig(path=Path(), vocabulary_pad_multiple=pad_multiple, transformer_impl="local")
        model = build_model_on_meta(architecture, model_config, layout)
        self.sharded_state: ShardedStateDict = {"model0": model.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp})}
        apply_factories(self.sharded_state)
        owners = {
            tensor.untyped_storage()._cdata: (name, tensor)
            for name, tensor in global_parameters([model], self.weight_map, layout).items()
        }
        tensors = [value for value in nested_values(self.sharded_state) if isinstance(value, ShardedTensor)]
        self.fragments = {(tensor.key, tensor.global_offset): _fragment(tensor, owners) for tensor in tensors}

    def hugging_face_rows(self, parameter: str) -> list[Rows]:
        """Return the rows that make up a whole Megatron parameter, in order."""
        shard = self.weight_map.shard(parameter, 0, 1)
        shapes = dict(
            zip(self.weight_map.parameters[parameter].hugging_face, self.weight_map.parameters[parameter].shapes, strict=True)
        )
        # what is cut along columns is whole on one rank
        rows: list[Rows] = [
            (piece.name, piece.start, piece.stop) if piece.dim == 0 else (piece.name, 0, shapes[piece.name][0])
            for piece in shard.slices
        ]
        return [*rows, (None, 0, shard.padding)] if shard.padding else rows


def _fragment(sharded: ShardedTensor, owners: dict[int, tuple[str, Tensor]]) -> Fragment:
    view = sharded.data
    name, whole = owners.get(view.untyped_storage()._cdata, ("", view))
    row = math.prod(whole.shape[1:])
    if not name or not view.is_contiguous() or view.shape[1:] != whole.shape[1:] or view.storage_offset() % row:
        raise WeightsError(f"megatron-core saves {sharded.key} {list(view.shape)}, which is not rows of a known parameter")
    return Fragment(
        key=sharded.key,
        whole_shape=tuple(sharded.global_shape),
        offsets=tuple(sharded.global_offset),
        shape=tuple(view.shape),
        parameter=name,
        start=view.storage_offset() // row,
        is_padded=sharded.allow_shape_mismatch,
    )


def overlap(rows: list[Rows], start: int, stop: int) -> Iterator[tuple[int, Rows]]:
    """Cut ``start:stop`` out of ``rows`` laid after one another; each part with the row, from ``start`` on, where it begins."""
    at = 0
    for name, first, last in rows:
        low, high = max(start, at), min(stop, at + last - first)
        if low < high:
            yield low - start, (name, first + low - at, first + high - at)
        at += last - first


@dataclass(frozen=True, slots=True)
class FragmentRows:
    """Rows ``start:stop`` of a Hugging Face tensor and the rows of a fragment, from ``at`` on, that hold them."""

    start: int
    stop: int
    fragment: Fragment
    at: int


class MegatronFolder:
    """A distributed checkpoint as Hugging Face tensors.

    Raises:
        CheckpointError: it lacks tensors of the model, or is of another one.
    """

    def __init__(self, checkpoint: DistributedCheckpoint, checkpoint_map: CheckpointMap) -> None:
        self.folder = checkpoint.folder
        self.shapes = checkpoint_map.weight_map.hugging_face_shapes()
        _check_model(checkpoint, list(checkpoint_map.fragments.values()))
        self._checkpoint = checkpoint
        self._parts: dict[str, list[FragmentRows]] = {name: [] for name in self.shapes}
        for fragment in checkpoint_map.fragments.values():
            rows = checkpoint_map.hugging_face_rows(fragment.parameter)
            for at, (name, start, stop) in overlap(rows, fragment.start, fragment.start + fragment.shape[0]):
                if name is not None:
                    self._parts[name].append(FragmentRows(start, stop, fragment, at))
        self.dtypes = {name: checkpoint.tensors[parts[0].fragment.key].dtype for name, parts in self._parts.items()}

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill ``target`` with rows of the Hugging Face tensor ``name``, from row ``start`` on."""
        stop = start + target.shape[0]
        for part in self._parts[name]:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                first = part.at + low - part.start
                offsets, shape = part.fragment.box(first, first + high - low)
                self._checkpoint.read_box(part.fragment.key, offsets, target[low - start : high - start].view(shape))


def _check_model(checkpoint: DistributedCheckpoint, fragments: list[Fragment]) -> None:
    missing = sorted({fragment.key for fragment in fragments} - checkpoint.tensors.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.folder} does not fit config.json; missing: {listed(missing)}")
    for fragment in fragments:
        shape = checkpoint.tensors[fragment.key].shape
        rows_free = slice(1 if fragment.is_padded else 0, None)
        if len(shape) != len(fragment.whole_shape) or shape[rows_free] != fragment.whole_shape[rows_free]:
            raise CheckpointError(
                f"{checkpoint.folder} does not fit config.json; "
                f"{fragment.key} is {list(shape)}, expected {list(fragment.whole_shape)}"
            )
