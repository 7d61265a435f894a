"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from megarl.models.architecture import Architecture
from megarl.weights.families.blocks import attention, embedding, left_out, mlp, output, qkv_bias
from megarl.weights.rules import Family, Rule


def rules(a: Architecture) -> tuple[Rule, ...]:
    """Qwen2's table."""
    return (*embedding(a), *attention(a), *qkv_bias(a), *mlp(a), *output(a))


FAMILY = Family(rules, left_out)
