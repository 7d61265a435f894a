"""Faults of megatron-core 0.16 to 0.19, mended for CPU and GPU alike.

Two silently change numbers: both concern checkpoints of the distributed optimizer in the fully reshardable format. The last one
keeps experts and latent attention from working without Transformer Engine.
"""

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def _own_step_per_parameter() -> None:
    """Loading the distributed optimizer misses 'step' and then shares one step tensor among all parameters (corrupting Adam)."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][group_order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _keep_bucket_padding() -> None:
    """Saving joins the buckets of a buffer without their padding but cuts parameters at offsets that count it.

    With several buckets (tied embeddings under pipeline parallelism, overlapped reduction) every parameter after the first
    bucket is then saved shifted, and the end as zeros. Here each bucket is put back where the offsets expect it.
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero

    def get_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers):
            for tensors in (state or {}).get(index, {}).values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    if key in tensors:
                        tensors[key] = _with_padding(tensors[key], buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = get_state


def _with_padding(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = joined.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return padded


def _work_without_transformer_engine() -> None:
    """0.16 leaves the router's matrix product undefined, and takes a stand-in for Transformer Engine's linear layer in MLA."""
    if find_spec("transformer_engine") is None:
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False


_own_step_per_parameter()
_keep_bucket_padding()
_work_without_transformer_engine()
