"""Norms that megatron-core's layers have no place for: over all heads together, and behind attention and MLP."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megarl.parallel.logprobs import sum_over_group


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor parallel ranks, each of which has some heads and their part of the weight.

    Args:
        width: elements of this rank's heads.
        config: of the layer.
        tp_group: the ranks that share the heads, each as many.
    """

    def __init__(self, width: int, config: TransformerConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self._epsilon = config.layernorm_epsilon
        self._tp_group = tp_group

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise [..., heads of this rank, head dim], in float32 as transformers does.

        The sum of squares is the only thing that ranks share; its gradient too is the sum of all ranks'.
        """
        values = heads.flatten(-2).float()
        squares = sum_over_group(values.square().sum(-1, keepdim=True), self._tp_group)
        mean = squares / (values.shape[-1] * self._tp_group.size())
        return (self.weight * (values * torch.rsqrt(mean + self._epsilon))).to(heads.dtype).view(heads.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, object] | None = None
    ) -> dict[str, Any]:
        """Describe the weight, cut along its only dimension, for megatron-core's checkpoints."""
        state = self.state_dict(prefix="", keep_vars=True)
        dp_cp_group = (metadata or {})["dp_cp_group"]
        sharded: dict[str, object] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets, tp_group=self._tp_group, dp_cp_group=dp_cp_group
        )
        return sharded


class AllHeadsNormAttention(SelfAttention):
    """megatron-core's SelfAttention with the norms over all heads, of queries and of keys, in the place of those over each."""

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int, **options: object
    ) -> None:
        super().__init__(config, submodules, layer_number, **options)
        width, tp_group = self.hidden_size_per_attention_head, self.pg_collection.tp
        self.q_layernorm = AllHeadsNorm(self.num_attention_heads_per_partition * width, config, tp_group)
        self.k_layernorm = AllHeadsNorm(self.num_query_groups_per_partition * width, config, tp_group)


class OutputNormLayer(TransformerLayer):
    """A transformer layer that normalises what attention and MLP give, ahead of the residual, and not what they take.

    Args:
        norm: class of the norms, local or Transformer Engine's.
    """

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, norm: type, **options: object) -> None:
        super().__init__(config, submodules, **options)
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_attention_layernorm = norm(**sizes)
        self.post_feedforward_layernorm = norm(**sizes)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """Compute [tokens, batch, hidden size] from the same; megatron-core's layers return a context too.

        Args:
            hidden_states: of the layer below.
            attention_mask: None, as sequences are packed.
            rotary_pos_emb: angles of the positions.
            packed_seq_params: where sequences begin.
            unused: of cross attention and of generation, which models here do not have.
        """
        attended, _ = self.self_attention(
            hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        output, _ = self.mlp(hidden_states)
        return hidden_states + self.post_feedforward_layernorm(output), None
