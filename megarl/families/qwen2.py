"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from dataclasses import replace

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, read_decoder
from megarl.families.base.engine_rules import EngineLayout, EngineRule
from megarl.families.base.family import Family
from megarl.families.base.weight_rules import Rule


class Qwen2(Family):
    """The family of Qwen2 and Qwen2.5."""

    def read(self, config: ConfigJson) -> Architecture:
        """Read a dense decoder; its biases are no key of config.json."""
        return replace(read_decoder(config), qkv_bias=True)

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return Llama's table with biases."""
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.input_norm(model),
            *weight_blocks.attention(model),
            *weight_blocks.qkv_bias(model),
            *weight_blocks.mlp_norm(model),
            *weight_blocks.mlp(model),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return a dense decoder's table with biases."""
        return engine_rules.dense_decoder(engines, "weight", "bias")


FAMILY = Qwen2()
