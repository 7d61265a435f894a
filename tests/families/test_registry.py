"""Families are found everywhere they must be, and read config.json as transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from megarl.families import registry
from megarl.families.base.architecture import Architecture
from megarl.families.base.family import Family
from megarl.families.registry import MODEL_TYPES, family_of, read_architecture
from tiny import CLASSES

# what has to be in a config.json, whatever the family; everything else has a default
NEEDED = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
}


def test_every_file_is_registered() -> None:
    files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")} - {"__init__", "registry"}
    assert files == set(MODEL_TYPES)


def test_every_family_has_a_tiny_model() -> None:
    """The tests of weights, layouts, conversion and plans run over these."""
    assert set(CLASSES) == set(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_whole(model_type: str) -> None:
    family = family_of(model_type)
    assert isinstance(family, Family)
    assert set(family.never_tied_by) | set(family.experts_everywhere_in) <= {"vllm", "sglang"}


def expected_of(config: PretrainedConfig) -> dict[str, Any]:
    """Transformers' values by the names of ``Architecture``."""
    heads = config.num_attention_heads
    is_latent = config.model_type == "deepseek_v3"
    width = config.qk_nope_head_dim + config.qk_rope_head_dim if is_latent else getattr(config, "head_dim", None)
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.intermediate_size,
        "num_heads": heads,
        "num_kv_heads": heads if is_latent else config.num_key_value_heads,
        "head_dim": width or config.hidden_size // heads,
        "vocabulary_size": config.vocab_size,
        "norm_epsilon": config.rms_norm_eps,
        "tied_embeddings": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "sliding_window": getattr(config, "sliding_window", None),
    }


def assert_read_alike(folder: Path) -> Architecture:
    model, config = read_architecture(folder), AutoConfig.from_pretrained(folder)
    expected = expected_of(config)
    assert {name: getattr(model, name) for name in expected} == expected
    if model.moe is not None:
        assert model.moe.top_k == config.num_experts_per_tok
        assert model.moe.normalise_top_k == getattr(config, "norm_topk_prob", True)
        assert model.moe.ffn_size == getattr(config, "moe_intermediate_size", config.intermediate_size)
    if model.mla is not None:
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        assert {name: getattr(model.mla, name) for name in names} == {name: getattr(config, name) for name in names}
        assert model.moe is not None
        assert model.moe.shared_ffn_size == config.n_shared_experts * config.moe_intermediate_size
        assert model.moe.scaling_factor == config.routed_scaling_factor
        assert (model.moe.num_groups, model.moe.top_k_groups) == (config.n_group, config.topk_group)
        assert model.moe.moe_layers == tuple(range(config.first_k_dense_replace, config.num_hidden_layers))
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults_are_transformers(tmp_path: Path, model_type: str) -> None:
    """With the fewest keys; DeepSeek-V3's first three layers have no experts by default."""
    layers = {"num_hidden_layers": 5} if model_type == "deepseek_v3" else {}
    values = {"model_type": model_type} | NEEDED | EXPERTS.get(model_type, {}) | layers
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_read_alike(tmp_path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_values_are_transformers(tmp_path: Path, model_type: str) -> None:
    config_class, _, special = CLASSES[model_type]
    changed = {"rms_norm_eps": 3e-4, "initializer_range": 0.05, "tie_word_embeddings": True}
    config_class(**(NEEDED | special | changed)).save_pretrained(tmp_path)
    model = assert_read_alike(tmp_path)
    assert (model.norm_epsilon, model.initializer_range, model.tied_embeddings) == (3e-4, 0.05, True)
