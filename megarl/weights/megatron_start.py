"""Starting a model from a Megatron checkpoint instead of a Hugging Face folder: each rank reads its own parts."""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories

from megarl.models.build import CausalLM
from megarl.parallel.layout import Layout
from megarl.weights.distributed_checkpoint import DistributedCheckpoint
from megarl.weights.files.stored_tensors import check_finite
from megarl.weights.sharded_state import fill_from


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
