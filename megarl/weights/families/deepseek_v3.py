"""DeepSeek-V3 and R1: latent attention, shared and routed experts, a correction bias on the router (arXiv 2412.19437)."""

import re

from megarl.models.architecture import Architecture
from megarl.weights.families import blocks
from megarl.weights.families.blocks import embedding, experts, layer_part, layer_rule, mlp, moe_norm, norm_rule, output, router
from megarl.weights.rules import Family, Kind, Layers, LeftOut, Rule, Start


def rules(a: Architecture) -> tuple[Rule, ...]:
    """DeepSeek-V3's table."""
    return (
        *embedding(a),
        *latent_attention(a),
        *mlp(a, Layers.DENSE),
        *moe_norm(a),
        *router(a, "mlp.gate.weight"),
        *correction_bias(a),
        *experts(a, "mlp.experts.{expert}."),
        *shared_experts(a),
        *output(a),
    )


def latent_attention(a: Architecture) -> tuple[Rule, ...]:
    """Multi-head latent attention; query and key-value heads are rows [nope; rope] and [key; value] on both sides."""
    assert a.mla is not None
    mla, name = a.mla, "self_attention."
    query, value = a.num_heads * a.head_dim, a.num_heads * mla.v_head_dim
    queries: tuple[Rule, ...]
    if mla.q_lora_rank is None:
        queries = (
            layer_rule(name + "linear_q_proj.weight", Kind.COLUMN, layer_part("self_attn.q_proj.weight", query, a.hidden_size)),
        )
    else:
        down = layer_part("self_attn.q_a_proj.weight", mla.q_lora_rank, a.hidden_size)
        up = layer_part("self_attn.q_b_proj.weight", query, mla.q_lora_rank)
        queries = (
            layer_rule(name + "linear_q_down_proj.weight", Kind.REPLICATED, down),
            norm_rule(name + "q_layernorm.weight", "self_attn.q_a_layernorm.weight", mla.q_lora_rank),
            layer_rule(name + "linear_q_up_proj.weight", Kind.COLUMN, up),
        )
    down = layer_part("self_attn.kv_a_proj_with_mqa.weight", mla.kv_lora_rank + mla.qk_rope_head_dim, a.hidden_size)
    up = layer_part("self_attn.kv_b_proj.weight", a.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    return (
        norm_rule("input_layernorm.weight", "input_layernorm.weight", a.hidden_size),
        *queries,
        layer_rule(name + "linear_kv_down_proj.weight", Kind.REPLICATED, down),
        norm_rule(name + "kv_layernorm.weight", "self_attn.kv_a_layernorm.weight", mla.kv_lora_rank),
        layer_rule(name + "linear_kv_up_proj.weight", Kind.COLUMN, up),
        layer_rule(name + "linear_proj.weight", Kind.ROW, layer_part("self_attn.o_proj.weight", a.hidden_size, value)),
    )


def correction_bias(a: Architecture) -> tuple[Rule, ...]:
    """The bias that steers the choice of experts; a constant to the gradient."""
    part = layer_part("mlp.gate.e_score_correction_bias", a.num_experts, start=Start.ZEROS)
    return (layer_rule("mlp.router.expert_bias", Kind.REPLICATED, part, layers=Layers.MOE, is_buffer=True),)


def shared_experts(a: Architecture) -> tuple[Rule, ...]:
    """All shared experts as one SwiGLU, as in the checkpoints."""
    if a.moe is None or a.moe.shared_ffn_size == 0:
        return ()
    return blocks.swiglu("mlp.shared_experts.", "mlp.shared_experts.", a.moe.shared_ffn_size, a.hidden_size, Layers.MOE)


def left_out(a: Architecture) -> tuple[LeftOut, ...]:
    """The published checkpoints hold layers that predict one more token; they follow the model's own layers."""
    numbers = [str(a.num_layers + extra) for extra in range(getattr(a.hf_config, "num_nextn_predict_layers", 0) or 0)]
    if not numbers:
        return blocks.left_out(a)
    names = re.compile(rf"model\.layers\.({'|'.join(numbers)})\..*")
    return (
        *blocks.left_out(a),
        LeftOut(names, "layers for multi-token prediction, which are not trained"),
    )


FAMILY = Family(rules, left_out)
