"""The router of mixtures of experts."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


class ConstantBiasRouter(TopKRouter):
    """DeepSeek-V3's router, whose correction bias stays what the checkpoint says.

    megatron-core's ``moe_router_enable_expert_bias`` moves the bias after each step to balance the experts' load, which is a
    pretraining method (docs/decisions): here the bias is a constant of the model.
    """

    expert_bias: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.expert_bias  # None, as the config leaves the moving bias off
        self.register_buffer("expert_bias", torch.zeros(self.config.num_moe_experts, dtype=torch.float32))
