"""Llama: RMSNorm, SwiGLU, grouped queries, no biases."""

from megarl.models.architecture import Architecture
from megarl.weights.families.blocks import attention, embedding, left_out, mlp, output
from megarl.weights.rules import Family, Rule


def rules(a: Architecture) -> tuple[Rule, ...]:
    """Llama's table."""
    return (*embedding(a), *attention(a), *mlp(a), *output(a))


FAMILY = Family(rules, left_out)
