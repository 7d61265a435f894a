"""Refuses models that MegaRL's layers do not compute, whatever their family."""

from collections.abc import Iterator

from megarl.families.base.architecture import Architecture, MixtureOfExperts

BIASES = ("attention_bias", "mlp_bias")  # switches of config.json


def common_refusals(model: Architecture) -> Iterator[str]:
    """Say what no family's layers compute; one line, without the file's name, for each."""
    values = model.config_json
    if (activation := values.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act {str(activation)!r} is not supported; only silu (SwiGLU) is: give another model"
    for name in BIASES:
        if values.get(name):
            yield f"{name} is true and not supported for {model.family}; give a model without these biases"
    if model.moe is not None:
        yield from (f"{line}; give another model" for line in _unsupported_routing(model.moe))
    if model.quantization is not None:
        yield f"the weights are quantized ({model.quantization}) and cannot be trained; give full-precision weights"


def _unsupported_routing(moe: MixtureOfExperts) -> Iterator[str]:
    """Say what megatron-core's router computes otherwise than the family does."""
    if moe.top_k > moe.num_experts:
        yield f"num_experts_per_tok {moe.top_k} exceeds the {moe.num_experts} experts"
    if moe.score_function == "sigmoid" and not moe.normalise_top_k:
        yield "norm_topk_prob false is not supported with sigmoid scores"
    if moe.normalise_top_k and moe.top_k == 1:
        yield "num_experts_per_tok 1 with normalised scores is not supported (the router would get no gradient)"
    if moe.num_experts % moe.num_groups:
        yield f"n_group {moe.num_groups} does not divide the {moe.num_experts} experts"
    if moe.num_groups > moe.top_k_groups and moe.top_k // moe.top_k_groups != 2:
        # groups are ranked by their best top_k / topk_group scores in megatron-core, by their best two in the family
        yield (
            f"num_experts_per_tok {moe.top_k} with topk_group {moe.top_k_groups} is not supported; "
            f"only num_experts_per_tok = 2 × topk_group is"
        )
