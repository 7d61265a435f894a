"""Filling megatron-core's sharded state dicts from a checkpoint of any layout, through a reader that executes nothing.

It takes the place of ``megatron.core.dist_checkpointing.load``, which unpickles ``.metadata`` and every object it finds.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor

from megarl.errors import CheckpointError
from megarl.models.build import CausalLM
from megarl.parallel.layout import Layout
from megarl.weights.distributed_checkpoint import DistributedCheckpoint
from megarl.weights.files.stored_tensors import check_finite

EXTRA_STATE = "._extra_state"  # Transformer Engine's, of 8-bit training, and a pickle of its own


@torch.no_grad()
def load_sharded_state(folder: Path, sharded_state: dict[str, object]) -> dict[str, Any]:
    """Load the values of a sharded state dict; tensors that it has are filled in place.

    Modules' extra state is not read: it holds scales of 8-bit training, which MegaRL does not do, as a pickle.

    Args:
        folder: of ``.metadata``.
        sharded_state: as the models and optimizers of this rank give it.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    checkpoint = DistributedCheckpoint(folder, keep_cached=True)
    sharded, fixed, factories = load_preprocess(sharded_state)
    sharded, _ = extract_sharded_base(sharded)
    state = checkpoint.common_state()
    merge(state, fixed)
    merge(state, dict_list_map_inplace(lambda item: _value(checkpoint, item), sharded))
    filled: dict[str, object] = apply_factory_merges(state, factories)
    return filled


def _value(checkpoint: DistributedCheckpoint, item: ShardedTensor | ShardedObject) -> Any:
    if isinstance(item, ShardedTensor):
        return fill_from(checkpoint, item)
    return item.data if item.key.endswith(EXTRA_STATE) else checkpoint.read_object(item.unique_key)


def fill_from(checkpoint: DistributedCheckpoint, sharded: ShardedTensor) -> Tensor:
    """Copy the part of the checkpoint that ``sharded`` describes into its tensor, made here if there is none, and return that.

    Raises:
        CheckpointError: the checkpoint lacks it, or has another shape.
    """
    stored = checkpoint.tensors.get(sharded.key)
    if stored is None:
        raise CheckpointError(f"{checkpoint.folder} does not fit config.json; missing: {sharded.key}")
    if sharded.data is None:
        sharded.init_data("cpu")
    rows = len(sharded.global_shape) - sharded.data.dim()  # the dimension of the tensor's rows: layers and experts are in front
    expected = list(sharded.global_shape)
    if sharded.allow_shape_mismatch and len(stored.shape) == len(expected):
        expected[rows] = stored.shape[rows]  # the vocabulary is padded for the layout that saved it
    if list(stored.shape) != expected:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit config.json; {sharded.key} is {list(stored.shape)}, expected {expected}"
        )
    if not sharded.data.dim():
        values = torch.empty((), dtype=stored.dtype)
        checkpoint.read_box(sharded.key, (), values)
        return sharded.data.copy_(values)
    first = sharded.global_offset[rows]
    num_rows = max(0, min(sharded.data.shape[0], stored.shape[rows] - first))
    values = torch.empty((*(1 for _ in range(rows)), num_rows, *sharded.data.shape[1:]), dtype=stored.dtype)
    checkpoint.read_box(sharded.key, tuple(sharded.global_offset), values)
    sharded.data[:num_rows].copy_(values.view(num_rows, *sharded.data.shape[1:]))
    sharded.data[num_rows:].zero_()
    return sharded.data


@torch.no_grad()
def load_megatron_weights(chunks: list[CausalLM], folder: Path, layout: Layout) -> None:
    """Fill this rank's parameters and buffers from a torch_dist folder of any layout; reads nothing but tensors.

    Raises:
        CheckpointError: it is damaged, or of another model.
        WeightsError: it holds numbers that are not finite.
    """
    checkpoint = DistributedCheckpoint(folder)
    for chunk in chunks:
        state: ShardedStateDict = {"model": chunk.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp})}
        apply_factories(state)
        for sharded in nested_values(state):
            if isinstance(sharded, ShardedTensor):
                fill_from(checkpoint, sharded)
                if sharded.data is not None:
                    check_finite(sharded.data, sharded.key, folder)
