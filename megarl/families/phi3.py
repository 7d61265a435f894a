"""Phi-3 and Phi-4: Llama's layers, with query, key and value projection in one tensor, and gate and up projection in another."""

from collections.abc import Iterator
from dataclasses import replace

from megarl.families.base import engine_rules, weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson, kv_heads_or_all, read_decoder, sliding_window
from megarl.families.base.engine_rules import Cut, EngineLayout, EngineRule
from megarl.families.base.family import Family
from megarl.families.base.rope_scaling import NAMES
from megarl.families.base.weight_blocks import layer_part, layer_rule
from megarl.families.base.weight_rules import Kind, Rule

QKV, GATE_UP, DOWN = "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"
NORM_EPSILON = 1e-5  # of transformers where a config leaves the key out


class Phi3(Family):
    """Phi-3, 3.5 and 4 whose heads rotate whole and whose RoPE is not scaled by length (longrope)."""

    def read(self, config: ConfigJson) -> Architecture:
        """Read a dense decoder whose layers all have a window, where config.json gives one."""
        decoder = read_decoder(config, kv_heads=kv_heads_or_all(config))
        epsilon = config.number("rms_norm_eps", NORM_EPSILON)
        return replace(decoder, norm_epsilon=epsilon, sliding_window=sliding_window(config, None))

    def refusals(self, model: Architecture) -> Iterator[str]:
        """Refuse scaled RoPE: transformers' config takes yarn for longrope, and nothing else (configuration_phi3)."""
        if model.rope_type != "default" and model.rope_type in NAMES:
            yield (
                f"rope_type {model.rope_type!r} is not supported for phi3, which transformers scales by longrope alone; "
                "use rope_type default and sequences of the original length, or give another model"
            )

    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return Llama's table with the two fused projections."""
        qkv, gate_up = _rows(model)
        return (
            *weight_blocks.embedding(model),
            *weight_blocks.input_norm(model),
            layer_rule("self_attention.linear_qkv.weight", Kind.QKV, layer_part(QKV, sum(qkv), model.hidden_size), fused=qkv),
            weight_blocks.attention_output(model),
            *weight_blocks.mlp_norm(model),
            layer_rule("mlp.linear_fc1.weight", Kind.GATE_UP, layer_part(GATE_UP, sum(gate_up), model.hidden_size), fused=gate_up),
            layer_rule("mlp.linear_fc2.weight", Kind.ROW, layer_part(DOWN, model.hidden_size, model.ffn_size)),
            *weight_blocks.output(model),
        )

    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return a dense decoder's table; both engines have the fused projections under their Hugging Face names."""
        qkv, gate_up = _rows(model)
        return (
            *engine_rules.embedding(),
            *engine_rules.norms("input_layernorm", "post_attention_layernorm"),
            engine_rules.layer_rule(QKV, Cut.HEADS, fused=qkv),
            engine_rules.layer_rule("self_attn.o_proj.weight", Cut.ROW),
            engine_rules.layer_rule(GATE_UP, Cut.COLUMN, group=engines.dense_group, fused=gate_up),
            engine_rules.layer_rule(DOWN, Cut.ROW, group=engines.dense_group),
            *engine_rules.output(engines),
        )


def _rows(model: Architecture) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Return the rows of query, key and value, and those of gate and up projection."""
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return (query, key_value, key_value), (model.ffn_size, model.ffn_size)


FAMILY = Phi3()
