"""Qwen3-MoE: Qwen3's attention, experts in some layers or all."""

from dataclasses import replace

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, read_decoder, softmax_experts
from megarl.families.base.engine_rules import Cut, EngineLayout, EngineRule, layer_rule
from megarl.families.base.family import Family
from megarl.families.base.weight_rules import Layers, Rule


class Qwen3Moe(Family):
    """The family of Qwen3 with experts."""

    never_tied_by = ("sglang",)
    experts_everywhere_in = ("sglang",)

    def read(self, config: ConfigJson) -> Architecture:
        """Read the decoder and its experts, which every ``decoder_sparse_step``-th layer has but for ``mlp_only_layers``."""
        decoder, values = read_decoder(config), config.values
        step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or ()
        moe = softmax_experts(
            config,
            number_keys=("num_experts", "num_local_experts"),  # transformers 5 writes the latter
            ffn_size=config.size("moe_intermediate_size"),
            normalise_top_k=bool(values.get("norm_topk_prob", False)),
            is_moe_layer=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(decoder.num_layers)),
        )
        return replace(decoder, qk_norm="head", moe=moe)

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return Qwen3's attention, and one MLP or experts."""
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.input_norm(model),
            *weight_blocks.attention(model),
            *weight_blocks.qk_norm(model),
            *weight_blocks.mlp_norm(model, Layers.DENSE),
            *weight_blocks.mlp(model, Layers.DENSE),
            *weight_blocks.moe_norm(model),
            *weight_blocks.router(model, "mlp.gate.weight"),
            *weight_blocks.experts(model, "mlp.experts.{expert}."),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return a dense decoder's table, its MLP for the layers without experts, with norms, routers and experts."""
        more = (
            *engine_rules.norms("self_attn.q_norm", "self_attn.k_norm"),
            layer_rule("mlp.gate.weight", Cut.NONE),
            *engine_rules.experts(f"mlp.{engines.experts_module}", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
        )
        return engine_rules.dense_decoder(engines, "weight", more=more)


FAMILY = Qwen3Moe()
