"""Qwen3 (dense): Llama with RMSNorm on each head's query and key."""

from megarl.models.architecture import Architecture
from megarl.weights.families.blocks import attention, embedding, left_out, mlp, output, qk_norm
from megarl.weights.rules import Family, Rule


def rules(a: Architecture) -> tuple[Rule, ...]:
    """Qwen3's table."""
    return (*embedding(a), *attention(a), *qk_norm(a), *mlp(a), *output(a))


FAMILY = Family(rules, left_out)
