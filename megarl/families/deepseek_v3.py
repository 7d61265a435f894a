"""DeepSeek-V3 and R1: latent attention, shared and routed experts, a correction bias on the router (arXiv 2412.19437)."""

import re
from collections.abc import Iterator
from dataclasses import replace

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture, LatentAttention, MixtureOfExperts
from megarl.families.base.config_json import ConfigJson, read_decoder
from megarl.families.base.engine_rules import Cut, EngineLayout, EngineName, EngineRule
from megarl.families.base.engine_rules import layer_rule as engine_rule
from megarl.families.base.family import Family
from megarl.families.base.weight_blocks import layer_part, layer_rule, norm_rule
from megarl.families.base.weight_rules import Kind, Layers, LeftOut, Rule, Start

LATENT_NORM_EPSILON = 1e-6  # DeepSeek's modeling code leaves it at the default of its RMSNorm, whatever rms_norm_eps says


class DeepseekV3(Family):
    """The family of DeepSeek-V3."""

    never_tied_by = ("vllm",)

    def read(self, config: ConfigJson) -> Architecture:
        """Read the sizes of latents and experts; a head has a key and a value of its own."""
        mla = _read_latent_attention(config)
        decoder = read_decoder(
            config, kv_heads=config.size("num_attention_heads"), head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim
        )
        return replace(decoder, mla=mla, moe=_read_experts(config, decoder.num_layers))

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return latent attention, dense layers below the layers with experts, and these."""
        return (
            *weight_blocks.embedding(model),
            *_latent_attention(model),
            *weight_blocks.mlp_norm(model, Layers.DENSE),
            *weight_blocks.mlp(model, Layers.DENSE),
            *weight_blocks.moe_norm(model),
            *weight_blocks.router(model, "mlp.gate.weight"),
            *_correction_bias(model),
            *weight_blocks.experts(model, "mlp.experts.{expert}."),
            *_shared_experts(model),
            *weight_blocks.output(model),
        )

    def left_out(self, model: Architecture) -> tuple[LeftOut, ...]:
        """Return the layers that predict one more token; published checkpoints hold them behind the model's own layers."""
        number = model.config_json.get("num_nextn_predict_layers") or 0
        if not number:
            return weight_blocks.left_out(model)
        layers = "|".join(str(model.num_layers + extra) for extra in range(number))
        return (
            *weight_blocks.left_out(model),
            LeftOut(re.compile(rf"model\.layers\.({layers})\..*"), "layers for multi-token prediction, which are not trained"),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return both engines' table, in which one projection makes the latents of queries and of keys and values."""
        has_whole_shared_experts = engines.traits.cuts_tokens_of_experts and engines.ep > engines.tp > 1
        shared = (Cut.NONE, Cut.NONE) if has_whole_shared_experts else (Cut.COLUMN, Cut.ROW)
        attention = "self_attn."
        parts = attention + "q_a_proj.weight", attention + "kv_a_proj_with_mqa.weight"
        return (
            *engine_rules.embedding(),
            *engine_rules.norms("input_layernorm"),
            engine_rule(f"{attention}{engines.traits.latents}.weight", Cut.NONE, *parts),
            engine_rule(attention + "kv_a_proj_with_mqa.weight", Cut.NONE),  # where queries are projected without a latent
            *engine_rules.norms(attention + "q_a_layernorm"),
            engine_rule(attention + "q_b_proj.weight", Cut.COLUMN),
            engine_rule(attention + "q_proj.weight", Cut.COLUMN),
            *engine_rules.norms(attention + "kv_a_layernorm"),
            engine_rule(attention + "kv_b_proj.weight", Cut.COLUMN),
            engine_rule(attention + "o_proj.weight", Cut.ROW),
            *engine_rules.norms("post_attention_layernorm"),
            *engine_rules.swiglu("mlp", engines.dense_group),
            engine_rule("mlp.gate.weight", Cut.NONE),
            engine_rule("mlp.gate.e_score_correction_bias", Cut.NONE),
            *engine_rules.swiglu("mlp.shared_experts", engines.dense_group, shared),
            *engine_rules.experts(f"mlp.{engines.experts_module}", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
            *engine_rules.output(engines),
        )

    def refusals(self, model: Architecture) -> Iterator[str]:
        """Refuse the rotation of halves: keys that share one rotated part are rotated in neighbouring pairs."""
        if model.config_json.get("rope_interleave") is False:
            yield "rope_interleave is false and not supported with latent attention; give another model"

    def engine_refusals(self, model: Architecture, engine: EngineName) -> Iterator[str]:
        """Refuse what engines read otherwise: RoPE's scaling, the latents' norms, and keys that transformers ignores."""
        if model.rope_type not in ("default", "yarn"):
            yield (
                f"{engine} takes any scaling of deepseek_v3's RoPE for yarn, and {model.path} has rope_type "
                f"{model.rope_type!r}; use embedded"
            )
        for name, default in (("attention_factor", None), ("truncate", True)):
            value = model.rope_parameters.get(name, default)
            if value != default:
                yield f"{engine} reads no {name} of deepseek_v3's RoPE, and {model.path} has {value}; use embedded"
        if model.norm_epsilon != LATENT_NORM_EPSILON:
            yield (
                f"{engine} gives the norms of deepseek_v3's latents rms_norm_eps {model.norm_epsilon:g} of "
                f"{model.path}, and the trainer {LATENT_NORM_EPSILON:g}; use embedded"
            )
        if model.moe is None:
            return
        for name, needed in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"), ("moe_layer_freq", 1)):
            value = model.config_json.get(name)
            if value != needed and not (engine == "vllm" and name == "moe_layer_freq" and value is None):
                yield (
                    f"{engine} reads {name} in {model.path / 'config.json'}, and transformers computes as with "
                    f"{needed!r}, not {value!r}; set it to {needed!r}, or use embedded"
                )


def _read_latent_attention(config: ConfigJson) -> LatentAttention:
    """Read the widths of the latents and of the parts of a head; transformers' where they are left out."""
    return LatentAttention(
        q_lora_rank=config.values.get("q_lora_rank", 1536),
        kv_lora_rank=config.values.get("kv_lora_rank") or 512,
        qk_nope_head_dim=config.values.get("qk_nope_head_dim") or 128,
        qk_rope_head_dim=config.values.get("qk_rope_head_dim") or 64,
        v_head_dim=config.values.get("v_head_dim") or 128,
    )


def _read_experts(config: ConfigJson, num_layers: int) -> MixtureOfExperts | None:
    """Read the experts; None where no layer has them."""
    values = config.values
    is_moe_layer = tuple(layer >= values.get("first_k_dense_replace", 3) for layer in range(num_layers))
    ffn_size = config.size("moe_intermediate_size")
    if not any(is_moe_layer):
        return None
    return MixtureOfExperts(
        num_experts=config.size("n_routed_experts", "num_local_experts"),  # transformers 5 writes the latter
        top_k=config.size("num_experts_per_tok"),
        ffn_size=ffn_size,
        shared_ffn_size=ffn_size * (values.get("n_shared_experts", 1) or 0),
        is_moe_layer=is_moe_layer,
        score_function="sigmoid",
        normalise_top_k=bool(values.get("norm_topk_prob", True)),
        num_groups=values.get("n_group", 8) or 1,
        top_k_groups=values.get("topk_group", 4) or 1,
        scaling_factor=config.number("routed_scaling_factor", 2.5),
        correction_bias=True,
    )


def _latent_attention(model: Architecture) -> tuple[Rule, ...]:
    """Return the rules of latent attention; query and key-value heads are rows [nope; rope] and [key; value] on both sides."""
    assert model.mla is not None
    mla, name = model.mla, "self_attention."
    query, value = model.num_heads * model.head_dim, model.num_heads * mla.v_head_dim
    queries: tuple[Rule, ...]
    if mla.q_lora_rank is None:
        queries = (
            layer_rule(name + "linear_q_proj.weight", Kind.COLUMN, layer_part("self_attn.q_proj.weight", query, model.hidden_size)),
        )
    else:
        down = layer_part("self_attn.q_a_proj.weight", mla.q_lora_rank, model.hidden_size)
        up = layer_part("self_attn.q_b_proj.weight", query, mla.q_lora_rank)
        queries = (
            layer_rule(name + "linear_q_down_proj.weight", Kind.REPLICATED, down),
            norm_rule(name + "q_layernorm.weight", "self_attn.q_a_layernorm.weight", mla.q_lora_rank),
            layer_rule(name + "linear_q_up_proj.weight", Kind.COLUMN, up),
        )
    down = layer_part("self_attn.kv_a_proj_with_mqa.weight", mla.kv_lora_rank + mla.qk_rope_head_dim, model.hidden_size)
    up = layer_part("self_attn.kv_b_proj.weight", model.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    return (
        norm_rule("input_layernorm.weight", "input_layernorm.weight", model.hidden_size),
        *queries,
        layer_rule(name + "linear_kv_down_proj.weight", Kind.REPLICATED, down),
        norm_rule(name + "kv_layernorm.weight", "self_attn.kv_a_layernorm.weight", mla.kv_lora_rank),
        layer_rule(name + "linear_kv_up_proj.weight", Kind.COLUMN, up),
        layer_rule(name + "linear_proj.weight", Kind.ROW, layer_part("self_attn.o_proj.weight", model.hidden_size, value)),
    )


def _correction_bias(model: Architecture) -> tuple[Rule, ...]:
    """Return the rule of the bias that steers the choice of experts; a constant to the gradient."""
    part = layer_part("mlp.gate.e_score_correction_bias", model.num_experts, start=Start.ZEROS)
    return (layer_rule("mlp.router.expert_bias", Kind.REPLICATED, part, layers=Layers.MOE, is_buffer=True),)


def _shared_experts(model: Architecture) -> tuple[Rule, ...]:
    """Return the rules of all shared experts as one SwiGLU, as in the checkpoints."""
    if model.moe is None or model.moe.shared_ffn_size == 0:
        return ()
    return weight_blocks.swiglu(
        "mlp.shared_experts.", "mlp.shared_experts.", model.moe.shared_ffn_size, model.hidden_size, Layers.MOE
    )


FAMILY = DeepseekV3()
