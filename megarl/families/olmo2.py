"""OLMo-2 (arXiv 2501.00656): norms behind attention and MLP instead of ahead of them, and over all heads' queries and keys."""

from collections.abc import Iterator
from dataclasses import replace

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, kv_heads_or_all, read_decoder
from megarl.families.base.engine_rules import EngineLayout, EngineName, EngineRule
from megarl.families.base.family import Family
from megarl.families.base.weight_blocks import layer_part, layer_rule, norm_rule
from megarl.families.base.weight_rules import Kind, Rule, Start

OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
NORM_EPSILON = 1e-5  # of transformers where a config leaves the key out


class Olmo2(Family):
    """The family of OLMo-2."""

    def read(self, config: ConfigJson) -> Architecture:
        """Read a dense decoder with OLMo-2's norms."""
        decoder = read_decoder(config, kv_heads=kv_heads_or_all(config))
        epsilon = config.number("rms_norm_eps", NORM_EPSILON)
        return replace(decoder, norm_epsilon=epsilon, qk_norm="all_heads", norms_outputs=True)

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return Llama's projections with OLMo-2's norms, of which those over all heads are cut with the heads."""
        query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        q_norm = layer_part("self_attn.q_norm.weight", query, start=Start.ONES)
        k_norm = layer_part("self_attn.k_norm.weight", key_value, start=Start.ONES)
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.attention(model),
            layer_rule("self_attention.q_layernorm.weight", Kind.COLUMN, q_norm),
            layer_rule("self_attention.k_layernorm.weight", Kind.COLUMN, k_norm),
            *weight_blocks.mlp(model),
            *(norm_rule(f"{name}.weight", f"{name}.weight", model.hidden_size) for name in OUTPUT_NORMS),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return both engines' table: each rank has the norms whole, and gathers queries and keys for them.

        vLLM serves the family with transformers' own modules (model_executor/models/transformers/), whose projections it fuses.
        """
        return (
            *engine_rules.embedding(),
            *engine_rules.attention("weight"),
            *engine_rules.norms("self_attn.q_norm", "self_attn.k_norm", *OUTPUT_NORMS),
            *engine_rules.swiglu("mlp", engines.dense_group),
            *engine_rules.output(engines),
        )

    def engine_refusals(self, model: Architecture, engine: EngineName) -> Iterator[str]:
        """Refuse heads of a width of their own for SGLang."""
        if engine == "sglang" and model.num_heads * model.head_dim != model.hidden_size:
            yield (
                f"sglang takes hidden_size / num_attention_heads for the width of olmo2's heads, and {model.path} has head_dim "
                f"{model.head_dim}; use vllm or embedded"
            )


FAMILY = Olmo2()
