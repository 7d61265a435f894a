"""Qwen3-MoE: Qwen3's attention, experts in some layers or all."""

from megarl.models.architecture import Architecture
from megarl.weights.families.blocks import attention, embedding, experts, left_out, mlp, moe_norm, output, qk_norm, router
from megarl.weights.rules import Family, Layers, Rule


def rules(a: Architecture) -> tuple[Rule, ...]:
    """Qwen3-MoE's table."""
    return (
        *embedding(a),
        *attention(a),
        *qk_norm(a),
        *mlp(a, Layers.DENSE),
        *moe_norm(a),
        *router(a, "mlp.gate.weight"),
        *experts(a, "mlp.experts.{expert}."),
        *output(a),
    )


FAMILY = Family(rules, left_out)
