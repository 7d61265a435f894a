"""Qwen3 (dense): Llama with RMSNorm on each head's query and key."""

from megarl.weights.families.llama import EMBEDDING, LAYER, OUTPUT, layer_rule
from megarl.weights.rules import Kind

QUERY_NORM = layer_rule("self_attention.q_layernorm.weight", Kind.REPLICATED, "self_attn.q_norm.weight")
KEY_NORM = layer_rule("self_attention.k_layernorm.weight", Kind.REPLICATED, "self_attn.k_norm.weight")

RULES = (*EMBEDDING, *LAYER, QUERY_NORM, KEY_NORM, *OUTPUT)
