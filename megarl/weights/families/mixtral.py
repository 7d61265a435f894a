"""Mixtral: Llama's attention, experts in every layer. Its w1, w3 and w2 are gate, up and down projection."""

from megarl.models.architecture import Architecture
from megarl.weights.families.blocks import attention, embedding, experts, left_out, moe_norm, output, router
from megarl.weights.rules import Family, Rule


def rules(a: Architecture) -> tuple[Rule, ...]:
    """Mixtral's table."""
    moe = "block_sparse_moe."
    return (
        *embedding(a),
        *attention(a),
        *moe_norm(a),
        *router(a, moe + "gate.weight"),
        *experts(a, moe + "experts.{expert}.", names=("w1", "w3", "w2")),
        *output(a),
    )


FAMILY = Family(rules, left_out)
