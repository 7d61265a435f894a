"""Starting a model from a Megatron checkpoint instead of a Hugging Face folder: each rank reads its own parts."""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories

from megarl.errors import CheckpointError
from megarl.models.build import CausalLM
from megarl.parallel.layout import Layout
from megarl.weights.distributed_checkpoint import DistributedCheckpoint


@torch.no_grad()
def load_megatron_weights(chunks: list[CausalLM], folder: Path, layout: Layout) -> None:
    """Fill this rank's parameters and buffers from a torch_dist folder of any layout; reads nothing but tensors.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    checkpoint = DistributedCheckpoint(folder)
    for chunk in chunks:
        state: ShardedStateDict = {"model": chunk.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp})}
        apply_factories(state)
        for sharded in nested_values(state):
            if isinstance(sharded, ShardedTensor):
                _fill(sharded, checkpoint)


def _fill(sharded: ShardedTensor, checkpoint: DistributedCheckpoint) -> None:
    """Copy the part of the checkpoint that ``sharded`` describes into its tensor, which is the model's own memory."""
    stored = checkpoint.tensors.get(sharded.key)
    if stored is None:
        raise CheckpointError(f"{checkpoint.folder} does not fit config.json; missing: {sharded.key}")
    rows = len(sharded.global_shape) - sharded.data.dim()  # the dimension of the tensor's rows: layers and experts are in front
    expected = list(sharded.global_shape)
    if sharded.allow_shape_mismatch and len(stored.shape) == len(expected):
        expected[rows] = stored.shape[rows]  # the vocabulary is padded for the layout that saved it
    if list(stored.shape) != expected:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit config.json; {sharded.key} is {list(stored.shape)}, expected {expected}"
        )
    first = sharded.global_offset[rows]
    num_rows = max(0, min(sharded.data.shape[0], stored.shape[rows] - first))
    values = torch.empty((*(1 for _ in range(rows)), num_rows, *sharded.data.shape[1:]), dtype=stored.dtype)
    checkpoint.read_box(sharded.key, tuple(sharded.global_offset), values)
    sharded.data[:num_rows].copy_(values.view(num_rows, *sharded.data.shape[1:]))
    sharded.data[num_rows:].zero_()
