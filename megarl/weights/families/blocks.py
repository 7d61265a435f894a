"""The parts that families have in common: embedding, grouped-query attention, SwiGLU, and the output layer."""

import re

from megarl.models.architecture import Architecture
from megarl.weights.rules import Kind, Layers, LeftOut, Part, Rule, Start

MEGATRON = "decoder.layers.{layer}."
HUGGING_FACE = "model.layers.{layer}."
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def layer_part(name: str, *shape: int, start: Start = Start.NORMAL) -> Part:
    """A Hugging Face tensor of one layer, its name relative to the layer."""
    return Part(HUGGING_FACE + name, shape, start)


def layer_rule(
    megatron: str,
    kind: Kind,
    *parts: Part,
    layers: Layers = Layers.ALL,
    transformer_engine: str | None = None,
    is_buffer: bool = False,
) -> Rule:
    """A rule for a parameter of layers, Megatron names relative to the layer."""
    return Rule(
        MEGATRON + megatron,
        parts,
        kind,
        layers,
        None if transformer_engine is None else MEGATRON + transformer_engine,
        is_buffer=is_buffer,
    )


def norm_rule(
    megatron: str, hugging_face: str, size: int, *, layers: Layers = Layers.ALL, transformer_engine: str | None = None
) -> Rule:
    """A rule for the weight of a norm in layers."""
    part = layer_part(hugging_face, size, start=Start.ONES)
    return layer_rule(megatron, Kind.REPLICATED, part, layers=layers, transformer_engine=transformer_engine)


def embedding(a: Architecture) -> tuple[Rule, ...]:
    """The token embedding."""
    part = Part(EMBEDDING, (a.vocabulary_size, a.hidden_size))
    return (Rule("embedding.word_embeddings.weight", (part,), Kind.VOCABULARY, Layers.BEFORE),)


def attention(a: Architecture) -> tuple[Rule, ...]:
    """Grouped-query attention with its input norm."""
    query, key_value = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return (
        norm_rule(
            "input_layernorm.weight",
            "input_layernorm.weight",
            a.hidden_size,
            transformer_engine="self_attention.linear_qkv.layer_norm_weight",
        ),
        layer_rule(
            "self_attention.linear_qkv.weight",
            Kind.QKV,
            layer_part("self_attn.q_proj.weight", query, a.hidden_size),
            layer_part("self_attn.k_proj.weight", key_value, a.hidden_size),
            layer_part("self_attn.v_proj.weight", key_value, a.hidden_size),
        ),
        layer_rule("self_attention.linear_proj.weight", Kind.ROW, layer_part("self_attn.o_proj.weight", a.hidden_size, query)),
    )


def qkv_bias(a: Architecture) -> tuple[Rule, ...]:
    """Biases on query, key and value."""
    query, key_value = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return (
        layer_rule(
            "self_attention.linear_qkv.bias",
            Kind.QKV,
            layer_part("self_attn.q_proj.bias", query, start=Start.ZEROS),
            layer_part("self_attn.k_proj.bias", key_value, start=Start.ZEROS),
            layer_part("self_attn.v_proj.bias", key_value, start=Start.ZEROS),
        ),
    )


def qk_norm(a: Architecture) -> tuple[Rule, ...]:
    """RMSNorm on each head's query and key."""
    return (
        norm_rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", a.head_dim),
        norm_rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", a.head_dim),
    )


def mlp(a: Architecture, layers: Layers = Layers.ALL) -> tuple[Rule, ...]:
    """SwiGLU MLP with its input norm."""
    return (
        norm_rule(
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            a.hidden_size,
            layers=layers,
            transformer_engine="mlp.linear_fc1.layer_norm_weight",
        ),
        *swiglu("mlp.", "mlp.", a.ffn_size, a.hidden_size, layers),
    )


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
    """The two weights of one SwiGLU, under prefixes relative to the layer.

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


def moe_norm(a: Architecture) -> tuple[Rule, ...]:
    """The norm ahead of router and experts; Transformer Engine too keeps it on its own."""
    return (norm_rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", a.hidden_size, layers=Layers.MOE),)


def router(a: Architecture, hugging_face: str) -> tuple[Rule, ...]:
    """The router's projection."""
    part = layer_part(hugging_face, a.num_experts, a.hidden_size)
    return (layer_rule("mlp.router.weight", Kind.REPLICATED, part, layers=Layers.MOE),)


def experts(
    a: Architecture, hugging_face: str, *, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """The routed experts, each a SwiGLU under the prefix ``hugging_face``."""
    if a.moe is None:
        return ()
    return swiglu(
        "mlp.experts.local_experts.{expert}.",
        hugging_face,
        a.moe.ffn_size,
        a.hidden_size,
        Layers.MOE,
        names=names,
        transformer_engine=("mlp.experts.linear_fc1.weight{expert}", "mlp.experts.linear_fc2.weight{expert}"),
    )


def output(a: Architecture) -> tuple[Rule, ...]:
    """Final norm and output layer; a tied one is a copy of the embedding."""
    part = Part(EMBEDDING if a.tied_embeddings else LM_HEAD, (a.vocabulary_size, a.hidden_size))
    return (
        Rule(
            "decoder.final_layernorm.weight",
            (Part("model.norm.weight", (a.hidden_size,), Start.ONES),),
            Kind.REPLICATED,
            Layers.AFTER,
        ),
        Rule("output_layer.weight", (part,), Kind.VOCABULARY, Layers.AFTER, is_copy=a.tied_embeddings),
    )


def left_out(a: Architecture) -> tuple[LeftOut, ...]:
    """What exporters write besides the weights: RoPE's constant frequencies, and a second copy of tied embeddings."""
    constants = LeftOut(re.compile(r".*rotary_emb\.inv_freq"))
    return (constants, LeftOut(re.compile(re.escape(LM_HEAD)))) if a.tied_embeddings else (constants,)
