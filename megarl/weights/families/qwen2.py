"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from megarl.weights.families.llama import EMBEDDING, LAYER, OUTPUT, layer_rule
from megarl.weights.rules import Kind

QKV_BIAS = layer_rule(
    "self_attention.linear_qkv.bias", Kind.QKV, "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"
)

RULES = (*EMBEDDING, *LAYER, QKV_BIAS, *OUTPUT)
