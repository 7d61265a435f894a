"""The parts of weight tables that families share: embedding, grouped-query attention, SwiGLU, experts, and the output layer."""

import re

from megarl.families.base.architecture import Architecture
from megarl.families.base.weight_rules import Kind, Layers, LeftOut, Part, Rule, Start

MEGATRON = "decoder.layers.{layer}."
HUGGING_FACE = "model.layers.{layer}."
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def layer_part(name: str, *shape: int, start: Start = Start.NORMAL) -> Part:
    """Return a Hugging Face tensor of one layer, its name relative to the layer."""
    return Part(HUGGING_FACE + name, shape, start)


def layer_rule(
    megatron: str,
    kind: Kind,
    *parts: Part,
    layers: Layers = Layers.ALL,
    transformer_engine: str | None = None,
    is_buffer: bool = False,
    fused: tuple[int, ...] = (),
) -> Rule:
    """Return a rule for a parameter of layers, Megatron names relative to the layer."""
    return Rule(
        MEGATRON + megatron,
        parts,
        kind,
        layers,
        None if transformer_engine is None else MEGATRON + transformer_engine,
        is_buffer=is_buffer,
        fused=fused,
    )


def norm_rule(
    megatron: str, hugging_face: str, size: int, *, layers: Layers = Layers.ALL, transformer_engine: str | None = None
) -> Rule:
    """Return a rule for the weight of a norm in layers."""
    part = layer_part(hugging_face, size, start=Start.ONES)
    return layer_rule(megatron, Kind.REPLICATED, part, layers=layers, transformer_engine=transformer_engine)


def embedding(model: Architecture) -> tuple[Rule, ...]:
    """Return the rule of the token embedding."""
    part = Part(EMBEDDING, (model.vocabulary_size, model.hidden_size))
    return (Rule("embedding.word_embeddings.weight", (part,), Kind.VOCABULARY, Layers.BEFORE),)


def input_norm(model: Architecture) -> tuple[Rule, ...]:
    """Return the rule of the norm ahead of attention, which Transformer Engine joins to the projection behind it."""
    name = "input_layernorm.weight"
    fused = "self_attention.linear_qkv.layer_norm_weight"
    return (norm_rule(name, name, model.hidden_size, transformer_engine=fused),)


def attention(model: Architecture) -> tuple[Rule, ...]:
    """Return the rules of grouped-query attention's four projections."""
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return (
        layer_rule(
            "self_attention.linear_qkv.weight",
            Kind.QKV,
            layer_part("self_attn.q_proj.weight", query, model.hidden_size),
            layer_part("self_attn.k_proj.weight", key_value, model.hidden_size),
            layer_part("self_attn.v_proj.weight", key_value, model.hidden_size),
        ),
        attention_output(model),
    )


def attention_output(model: Architecture) -> Rule:
    """Return the rule of the projection behind grouped-query attention."""
    part = layer_part("self_attn.o_proj.weight", model.hidden_size, model.num_heads * model.head_dim)
    return layer_rule("self_attention.linear_proj.weight", Kind.ROW, part)


def qkv_bias(model: Architecture) -> tuple[Rule, ...]:
    """Return the rules of biases on query, key and value."""
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return (
        layer_rule(
            "self_attention.linear_qkv.bias",
            Kind.QKV,
            layer_part("self_attn.q_proj.bias", query, start=Start.ZEROS),
            layer_part("self_attn.k_proj.bias", key_value, start=Start.ZEROS),
            layer_part("self_attn.v_proj.bias", key_value, start=Start.ZEROS),
        ),
    )


def qk_norm(model: Architecture) -> tuple[Rule, ...]:
    """Return the rules of RMSNorm on each head's query and key."""
    return (
        norm_rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", model.head_dim),
        norm_rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", model.head_dim),
    )


def mlp_norm(model: Architecture, layers: Layers = Layers.ALL) -> tuple[Rule, ...]:
    """Return the rule of the norm ahead of one MLP, which Transformer Engine joins to the projection behind it."""
    fused = "mlp.linear_fc1.layer_norm_weight"
    name = "post_attention_layernorm.weight"
    return (norm_rule("pre_mlp_layernorm.weight", name, model.hidden_size, layers=layers, transformer_engine=fused),)


def mlp(model: Architecture, layers: Layers = Layers.ALL) -> tuple[Rule, ...]:
    """Return the rules of the SwiGLU MLP of dense layers."""
    return swiglu("mlp.", "mlp.", model.ffn_size, model.hidden_size, layers)


def swiglu(
    megatron: str,
    hugging_face: str,
    ffn_size: int,
    hidden_size: int,
    layers: Layers,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    transformer_engine: tuple[str | None, str | None] = (None, None),
) -> tuple[Rule, ...]:
    """Return the rules of the two weights of one SwiGLU, under prefixes relative to the layer.

    Args:
        names: of gate, up and down projection.
        transformer_engine: names of both weights there, where they differ.
    """
    gate, up, down = (f"{hugging_face}{name}.weight" for name in names)
    return (
        layer_rule(
            megatron + "linear_fc1.weight",
            Kind.GATE_UP,
            layer_part(gate, ffn_size, hidden_size),
            layer_part(up, ffn_size, hidden_size),
            layers=layers,
            transformer_engine=transformer_engine[0],
        ),
        layer_rule(
            megatron + "linear_fc2.weight",
            Kind.ROW,
            layer_part(down, hidden_size, ffn_size),
            layers=layers,
            transformer_engine=transformer_engine[1],
        ),
    )


def moe_norm(model: Architecture) -> tuple[Rule, ...]:
    """Return the rule of the norm ahead of router and experts; Transformer Engine too keeps it on its own."""
    return (norm_rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", model.hidden_size, layers=Layers.MOE),)


def router(model: Architecture, hugging_face: str) -> tuple[Rule, ...]:
    """Return the rule of the router's projection."""
    part = layer_part(hugging_face, model.num_experts, model.hidden_size)
    return (layer_rule("mlp.router.weight", Kind.REPLICATED, part, layers=Layers.MOE),)


def experts(
    model: Architecture, hugging_face: str, *, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Return the rules of the routed experts, each a SwiGLU under the prefix ``hugging_face``."""
    if model.moe is None:
        return ()
    return swiglu(
        "mlp.experts.local_experts.{expert}.",
        hugging_face,
        model.moe.ffn_size,
        model.hidden_size,
        Layers.MOE,
        names=names,
        transformer_engine=("mlp.experts.linear_fc1.weight{expert}", "mlp.experts.linear_fc2.weight{expert}"),
    )


def output(model: Architecture) -> tuple[Rule, ...]:
    """Return the rules of final norm and output layer; a tied one is a copy of the embedding."""
    part = Part(EMBEDDING if model.tied_embeddings else LM_HEAD, (model.vocabulary_size, model.hidden_size))
    return (
        Rule(
            "decoder.final_layernorm.weight",
            (Part("model.norm.weight", (model.hidden_size,), Start.ONES),),
            Kind.REPLICATED,
            Layers.AFTER,
        ),
        Rule("output_layer.weight", (part,), Kind.VOCABULARY, Layers.AFTER, is_copy=model.tied_embeddings),
    )


def left_out(model: Architecture) -> tuple[LeftOut, ...]:
    """Return what exporters write besides the weights: RoPE's constant frequencies, and a second copy of tied embeddings."""
    constants = LeftOut(re.compile(r".*rotary_emb\.inv_freq"))
    return (constants, LeftOut(re.compile(re.escape(LM_HEAD)))) if model.tied_embeddings else (constants,)
