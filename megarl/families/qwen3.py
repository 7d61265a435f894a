"""Qwen3 (dense): Llama with RMSNorm on each head's query and key."""

from dataclasses import replace

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, read_decoder
from megarl.families.base.engine_rules import EngineLayout, EngineRule
from megarl.families.base.family import Family
from megarl.families.base.weight_rules import Rule

HEAD_DIM = 128  # of transformers where a config leaves the key out


class Qwen3(Family):
    """The family of Qwen3 without experts."""

    def read(self, config: ConfigJson) -> Architecture:
        """Read a dense decoder whose heads have a width of their own."""
        return replace(read_decoder(config), qk_norm="head", head_dim=config.values.get("head_dim") or HEAD_DIM)

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return Llama's table with norms on queries and keys."""
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.input_norm(model),
            *weight_blocks.attention(model),
            *weight_blocks.qk_norm(model),
            *weight_blocks.mlp_norm(model),
            *weight_blocks.mlp(model),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return a dense decoder's table with norms on queries and keys."""
        return engine_rules.dense_decoder(engines, "weight", more=engine_rules.norms("self_attn.q_norm", "self_attn.k_norm"))


FAMILY = Qwen3()
