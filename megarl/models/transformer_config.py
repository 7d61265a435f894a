"""Architecture and role to megatron-core's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megarl.config.schema import ModelConfig, ParallelConfig, RoleConfig
from megarl.families.base.architecture import Architecture, LatentAttention, MixtureOfExperts
from megarl.models.rope import softmax_scale

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTEXT_PARALLEL_NAMES = {
    "all_gather": "all_gather",
    "all_to_all": "a2a",
    "ring": "p2p",
    "hybrid": "a2a+p2p",
}  # megatron-core's names
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    architecture: Architecture, model: ModelConfig, role: RoleConfig, attention_factor: float, with_transformer_engine: bool
) -> TransformerConfig:
    """Return the megatron-core config of one role.

    Args:
        attention_factor: of cos and sin, from the RoPE type.
        with_transformer_engine: the layers are Transformer Engine's.
    """
    dtype = DTYPES[model.dtype]
    config_class = MLATransformerConfig if architecture.mla else TransformerConfig
    return config_class(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        # marks norms that ranks of tp hold alike, whose gradients megatron-core sums over them
        qk_layernorm=architecture.qk_norm == "head",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        softmax_scale=softmax_scale(architecture, attention_factor),
        init_method_std=architecture.initializer_range,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # our losses carry their global normaliser, so gradients are summed, never averaged
        calculate_per_token_loss=True,
        # micro-batches are packed by tokens and differ in length
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, in dense models too
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        **_parallel(role.parallel),
        **RECOMPUTE[role.recompute],
        **(_experts(architecture.moe, with_transformer_engine) if architecture.moe else {}),
        **(_latent_attention(architecture.mla, role.parallel.cp) if architecture.mla else {}),
    )


def _parallel(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.vpp > 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if parallel.pp == 2 and first is not None:
        last = None  # it follows from the first: given both, megatron-core divides by the 0 stages between them under vpp
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if interleaved else None,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp or parallel.tp,
        "sequence_parallel": parallel.sequence_parallel,
        "cp_comm_type": CONTEXT_PARALLEL_NAMES[parallel.context_parallel_method],
        # batched sends of the interleaved schedule mix up directions between two ranks (silently wrong gradients)
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
    }


def _experts(moe: MixtureOfExperts, with_transformer_engine: bool) -> dict[str, Any]:
    """Set experts so that no token is dropped and no load-balancing loss is added: the gradient is the objective's alone."""
    is_limited = moe.num_groups > moe.top_k_groups
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(is_moe) for is_moe in moe.is_moe_layer],
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score_function,
        # softmax over the chosen logits alone is the softmax over all, divided by the sum of the chosen
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalise_top_k,
        "moe_router_num_groups": moe.num_groups if is_limited else None,
        "moe_router_group_topk": moe.top_k_groups if is_limited else None,
        "moe_router_topk_scaling_factor": moe.scaling_factor if moe.scaling_factor != 1 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": with_transformer_engine,
    }


def _latent_attention(mla: LatentAttention, cp: int) -> dict[str, Any]:
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        # the branch whose rotary embedding returns a factor too; frequencies and factor are ours (models/latent_attention.py)
        "rope_type": "yarn",
        # upstream's own, which ours replaces, computes as many positions when it is built and cuts them into cp's zigzag chunks
        "original_max_position_embeddings": 2 * cp,
    }
