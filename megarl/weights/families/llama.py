"""Llama: RMSNorm, SwiGLU, grouped queries, no biases. Mistral-like families share the table."""

from megarl.weights.rules import Kind, Rule

MEGATRON = "decoder.layers.{layer}."
HUGGING_FACE = "model.layers.{layer}."


def layer_rule(megatron: str, kind: Kind, *hugging_face: str, transformer_engine: str | None = None) -> Rule:
    """A rule for a parameter of every layer, names relative to the layer."""
    return Rule(
        MEGATRON + megatron,
        tuple(HUGGING_FACE + name for name in hugging_face),
        kind,
        None if transformer_engine is None else MEGATRON + transformer_engine,
    )


EMBEDDING = (Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Kind.VOCABULARY),)
LAYER = (
    layer_rule(
        "input_layernorm.weight",
        Kind.REPLICATED,
        "input_layernorm.weight",
        transformer_engine="self_attention.linear_qkv.layer_norm_weight",
    ),
    layer_rule(
        "self_attention.linear_qkv.weight",
        Kind.QKV,
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    layer_rule("self_attention.linear_proj.weight", Kind.ROW, "self_attn.o_proj.weight"),
    layer_rule(
        "pre_mlp_layernorm.weight",
        Kind.REPLICATED,
        "post_attention_layernorm.weight",
        transformer_engine="mlp.linear_fc1.layer_norm_weight",
    ),
    layer_rule("mlp.linear_fc1.weight", Kind.GATE_UP, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    layer_rule("mlp.linear_fc2.weight", Kind.ROW, "mlp.down_proj.weight"),
)
OUTPUT = (
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Kind.REPLICATED),
    Rule("output_layer.weight", ("lm_head.weight",), Kind.VOCABULARY),
)

RULES = EMBEDDING + LAYER + OUTPUT
