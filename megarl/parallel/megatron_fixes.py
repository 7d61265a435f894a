"""Faults of megatron-core 0.16 to 0.19, mended for CPU and GPU alike.

Two silently change numbers: both concern checkpoints of the distributed optimizer in the fully reshardable format. A third
keeps experts and latent attention from working without Transformer Engine. A fourth mistakes the shapes of pipeline sends.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


def _own_step_per_parameter() -> None:
    """Mend loading: the distributed optimizer misses 'step' and then shares one step tensor among all parameters."""
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
    """Mend saving, which joins a buffer's buckets without their padding but cuts parameters at offsets that count it.

    With several buckets (tied embeddings under pipeline parallelism, overlapped reduction) every parameter after the first
    bucket is then saved shifted, and the end as zeros. Here each bucket is put back where the offsets expect it.
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero

    def get_state(self: Any, *args: object, **kwargs: object) -> Any:
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
    """Mend 0.16: define the router's matrix product, and keep MLA from taking Transformer Engine's stand-in for a linear layer."""
    if find_spec("transformer_engine") is None:
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False


class PipelineCommunicator(P2PCommunicator):
    """Megatron's communicator, exchanging shapes one direction after the other.

    Upstream posts the shapes of both directions at once. With two stages the previous and the next rank are the same, and
    messages between two ranks match in the order they were posted, so the two shapes can be mistaken for each other.
    """

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> Any:
        forward = self._exchange(tensor_send_next, self.next_rank, self.prev_rank if recv_prev else None)
        backward = self._exchange(tensor_send_prev, self.prev_rank, self.next_rank if recv_next else None)
        return forward, backward

    def _exchange(self, sent: Tensor | None, destination: int, source: int | None) -> list[int]:
        device = torch.cuda.current_device()
        operations = []
        received = torch.zeros(3, device=device, dtype=torch.int64)
        if sent is not None:
            shape = torch.tensor(sent.size(), device=device, dtype=torch.int64)
            operations.append(dist.P2POp(dist.isend, shape, destination, self.pp_group))
        if source is not None:
            operations.append(dist.P2POp(dist.irecv, received, source, self.pp_group))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return received.tolist()


_own_step_per_parameter()
_keep_bucket_padding()
_work_without_transformer_engine()
