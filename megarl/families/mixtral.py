"""Mixtral: Mistral's attention, experts in every layer. Its w1, w3 and w2 are gate, up and down projection."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, read_decoder, sliding_window, softmax_experts
from megarl.families.base.engine_rules import Cut, EngineLayout, EngineName, EngineRule, layer_rule
from megarl.families.base.family import Family
from megarl.families.base.weight_rules import Rule

MOE = "block_sparse_moe."
NORM_EPSILON = 1e-5  # of transformers where a config leaves the key out


class Mixtral(Family):
    """Mixtral 8x7B and 8x22B."""

    never_tied_by = ("sglang",)

    def read(self, config: ConfigJson) -> Architecture:
        """Read the decoder and its experts, whose width is under the key of a dense MLP's."""
        decoder = read_decoder(config)
        moe = softmax_experts(
            config,
            number_keys=("num_local_experts",),
            ffn_size=decoder.ffn_size,
            normalise_top_k=True,
            is_moe_layer=(True,) * decoder.num_layers,
        )
        epsilon, window = config.number("rms_norm_eps", NORM_EPSILON), sliding_window(config, None)
        return replace(decoder, norm_epsilon=epsilon, sliding_window=window, moe=moe)

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return Llama's attention and experts."""
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.input_norm(model),
            *weight_blocks.attention(model),
            *weight_blocks.moe_norm(model),
            *weight_blocks.router(model, MOE + "gate.weight"),
            *weight_blocks.experts(model, MOE + "experts.{expert}.", names=("w1", "w3", "w2")),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return a decoder's table with routers and experts in the place of MLPs."""
        return (
            *engine_rules.embedding(),
            *engine_rules.norms("input_layernorm"),
            *engine_rules.attention("weight"),
            *engine_rules.norms("post_attention_layernorm"),
            layer_rule(MOE + "gate.weight", Cut.NONE),
            *engine_rules.experts(MOE + engines.experts_module, MOE + "experts.{expert}", "w1", "w3", "w2"),
            *engine_rules.output(engines),
        )

    def completed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """State the width of heads, which transformers' YaRN multiplies as config.json has it."""
        width = values["hidden_size"] // values["num_attention_heads"]
        return {**values, "head_dim": values.get("head_dim") or width}

    def engine_refusals(self, model: Architecture, engine: EngineName) -> Iterator[str]:
        """Refuse scaled RoPE for SGLang."""
        if engine == "sglang" and model.rope_type != "default":
            yield (
                f"sglang does not scale mixtral's RoPE, and {model.path} has rope_type {model.rope_type!r}; use vllm or embedded"
            )


FAMILY = Mixtral()
