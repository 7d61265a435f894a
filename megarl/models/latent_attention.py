"""Multi-head latent attention with process groups and rotary frequencies of our own."""

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megarl.families.deepseek_v3 import LATENT_NORM_EPSILON


class ReplicatedLinear(torch.nn.Module):
    """A projection that every tensor parallel rank holds whole and applies to its own part of the sequence."""

    def __init__(self, input_size: int, output_size: int, config: MLATransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(output_size, input_size, dtype=config.params_dtype))
        # with sequence parallelism each rank has the gradient of its own tokens only, to be summed
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return [..., input size] to [..., output size]; megatron-core's linear layers return a bias too."""
        return F.linear(x, self.weight), None


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Rotary angles together with the factor of cos and sin, as megatron-core's YaRN embedding returns them."""

    attention_factor = 1.0

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, float]:
        """Return [positions, 1, 1, rotary dim] and the factor."""
        return super().forward(*args, **kwargs), self.attention_factor


class LatentAttentionModule(MLASelfAttention):
    """megatron-core's MLASelfAttention, its projections built here.

    Upstream cuts the down projections over tensor parallel ranks (local layers) and then gathers over global process groups,
    or gives the query projection no group at all; both need parallel_state. Here down projections are whole on every rank, as
    with Transformer Engine, and the latent norms are modules of their own in both implementations.
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, layer_number: int, **kwargs: object
    ) -> None:
        # past MLASelfAttention.__init__, which only builds the projections
        super(MLASelfAttention, self).__init__(config, submodules, layer_number, attention_type="self", **kwargs)
        self.core_attention.scale = config.softmax_scale
        self.rotary_pos_emb = ScaledRotaryEmbedding(config.qk_pos_emb_head_dim, rotary_percent=1.0, cp_group=self.pg_collection.cp)
        num_heads, hidden_size = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.linear_q_proj = self._column(submodules.linear_q_proj, hidden_size, num_heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = ReplicatedLinear(hidden_size, config.q_lora_rank, config)
            self.q_layernorm = self._norm(submodules.q_layernorm, config.q_lora_rank)
            self.linear_q_up_proj = self._column(submodules.linear_q_up_proj, config.q_lora_rank, num_heads * self.q_head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim, config)
        self.kv_layernorm = self._norm(submodules.kv_layernorm, config.kv_lora_rank)
        key_value = num_heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._column(submodules.linear_kv_up_proj, config.kv_lora_rank, key_value)

    def _column(self, spec: object, input_size: int, output_size: int) -> torch.nn.Module:
        return build_module(
            spec,
            input_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def _norm(self, spec: object, size: int) -> torch.nn.Module:
        return build_module(spec, hidden_size=size, config=self.config, eps=LATENT_NORM_EPSILON)
