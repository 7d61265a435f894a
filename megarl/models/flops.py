"""How much work a sequence is."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


@dataclass(frozen=True, slots=True)
class SequenceFlops:
    """Floating point operations of all layers' matrix products in one forward pass over a sequence of n tokens.

    Attributes:
        per_token: of projections, MLPs and the experts that a token visits: times n.
        per_pair: of causal attention: times n².
    """

    per_token: int
    per_pair: int

    def of(self, length: int) -> int:
        """Count the operations of a sequence of ``length`` tokens."""
        return length * (self.per_token + self.per_pair * length)


def sequence_flops(config: TransformerConfig) -> SequenceFlops:
    """Two operations for each multiply-add (PaLM, arXiv 2204.02311, appendix B); causal attention needs half of the n² scores."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if isinstance(config, MLATransformerConfig):
        key_width, value_width = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        latent = config.kv_lora_rank
        query = hidden * heads * key_width
        if config.q_lora_rank is not None:
            query = config.q_lora_rank * (hidden + heads * key_width)
        keys = hidden * (latent + config.qk_pos_emb_head_dim) + latent * heads * (config.qk_head_dim + value_width)
    else:
        key_width = value_width = config.kv_channels
        query, keys = hidden * heads * key_width, 2 * hidden * config.num_query_groups * key_width
    attention = query + keys + heads * value_width * hidden
    num_moe = sum(config.moe_layer_freq) if config.num_moe_experts else 0
    dense = 3 * hidden * config.ffn_hidden_size
    experts = 0
    if num_moe:
        width = config.moe_router_topk * config.moe_ffn_hidden_size + (config.moe_shared_expert_intermediate_size or 0)
        experts = hidden * (config.num_moe_experts + 3 * width)
    per_token = config.num_layers * attention + (config.num_layers - num_moe) * dense + num_moe * experts
    return SequenceFlops(per_token=2 * per_token, per_pair=config.num_layers * heads * (key_width + value_width))
