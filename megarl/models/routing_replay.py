"""Routers that send each token to the experts that the rollout engine sent it to (rollout routing replay, arXiv 2510.11370)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarl.families.base.architecture import Architecture
from megarl.models.build import CausalLM

TopK = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class ReplayedSeqParams(PackedSeqParams):
    """megatron-core's description of the packing, which every layer is called with, also when it is recomputed.

    Attributes:
        routed_experts: integer [tokens of this rank, num_moe_layers, top_k], the experts that each token is sent to, -1 where the
            trainer's own router chooses; None when it chooses everywhere.
    """

    routed_experts: Tensor | None = None


class ExpertReplay:
    """What megatron-core calls in place of a router's top-k when it is the router's ``router_replay``.

    megatron-core's own RouterReplay keeps the experts of all layers and micro-batches in global lists, whose order must be that in
    which schedule and recomputation visit them; here each layer is given those of the micro-batch that it is computing.
    """

    def __init__(self) -> None:
        self.experts: Tensor | None = None

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Scores [num_tokens, topk] of the chosen experts, through which the gradient flows, and their int64 indices."""
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.experts is None:
            return own_scores, own
        experts = self.experts.to(scores.device, torch.int64)
        chosen = torch.where(experts >= 0, experts, own)
        return scores.gather(1, chosen), chosen


def replay_routing(chunks: list[CausalLM], architecture: Architecture) -> None:
    """Let the routers of a model follow ``ReplayedSeqParams.routed_experts`` of each micro-batch."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            if architecture.is_moe_layer(number):
                replay = layer.mlp.router.router_replay = ExpertReplay()
                moe_layer = sum(architecture.is_moe_layer(below) for below in range(number))
                layer.register_forward_pre_hook(partial(_take_experts, replay, moe_layer), with_kwargs=True)


def _take_experts(
    replay: ExpertReplay, moe_layer: int, layer: object, arguments: tuple[object, ...], options: dict[str, Any]
) -> None:
    routed_experts = options["packed_seq_params"].routed_experts
    replay.experts = None if routed_experts is None else routed_experts[:, moe_layer]
