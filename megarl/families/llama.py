"""Llama: RMSNorm ahead of attention and MLP, SwiGLU, grouped queries, no biases."""

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, kv_heads_or_all, read_decoder
from megarl.families.base.engine_rules import EngineLayout, EngineRule
from megarl.families.base.family import Family
from megarl.families.base.weight_rules import Rule


class Llama(Family):
    """Llama 2 and 3."""

    def read(self, config: ConfigJson) -> Architecture:
        """Read a dense decoder; configs of before grouped-query attention leave the key-value heads out."""
        return read_decoder(config, kv_heads=kv_heads_or_all(config))

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return the table that most families start from."""
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.input_norm(model),
            *weight_blocks.attention(model),
            *weight_blocks.mlp_norm(model),
            *weight_blocks.mlp(model),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return a dense decoder's table."""
        return engine_rules.dense_decoder(engines, "weight")


FAMILY = Llama()
