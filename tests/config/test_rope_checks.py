"""Every refusal of model.rope_scaling: one line that names the value, the reason and the fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config.checks import check
from megarl.config.schema import Config
from megarl.errors import ConfigError
from small_model import MODEL

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4}
OWN_YARN = {"max_position_embeddings": 8192, "rope_scaling": {"type": "yarn"} | YARN}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 36,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}


def build(folder: Path, scaling: Any, tokens: int = 8192, engine: str = "embedded", **model: Any) -> Config:
    """A run of sequences of so many tokens, of a model with these changes in its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL | model))
    values = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": str(folder), "init": "random", "rope_scaling": scaling},
        "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}},
        "rewards": {"scorers": [{"type": "exact"}]},
        "rollout": {"max_prompt_tokens": tokens - 100, "max_new_tokens": 100, "engine": engine},
        "policy": {"max_tokens_per_micro_batch": 10**6},
    }
    return Config.model_validate(values)


@pytest.mark.parametrize(
    ("scaling", "tokens", "model"),
    [
        (YARN, 8192, {}),
        (YARN | {"factor": 4, "beta_fast": 16, "beta_slow": 2.5, "truncate": False}, 8192, {}),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.2}, 8192, {}),
        (LLAMA3, 8192, {}),
        (LINEAR, 8192, {}),
        ({"rope_type": "default"}, 2048, {}),
        (YARN | {"original_max_position_embeddings": 1024}, 4096, {}),  # Qwen3 itself: 32768 of 40960
        # in place of the model's own scaling, of which only the pretraining length stays
        (YARN | {"factor": 8.0}, 16384, OWN_YARN),
        (LINEAR | {"factor": 8}, 16384, OWN_YARN),
        (YARN | {"original_max_position_embeddings": 512}, 2048, {"rope_scaling": {"rope_type": "longrope"}}),
        # Llama 3.1 has more positions than factor × original
        (LLAMA3 | {"factor": 8.0}, 32768, {"max_position_embeddings": 32768}),
        # an exported folder of a run with linear scaling
        (LINEAR, 8192, {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    ],
)
def test_good_scalings_pass(tmp_path: Path, scaling: dict[str, Any], tokens: int, model: dict[str, Any]) -> None:
    check(build(tmp_path, scaling, tokens, **model), 1)


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "model.rope_scaling.rope_type: is missing; give one of default, linear, llama3, yarn"),
    ({"type": "yarn"}, {}, "model.rope_scaling.rope_type: is missing; give"),
    (YARN | {"rope_type": "yran"}, {}, "rope_type: 'yran' is unknown; the nearest is yarn; give one of default, linear,"),
    (YARN | {"rope_type": "dynamic"}, {}, "dynamic depends on the length of the sequence at hand, so two packings of one batch"),
    ({"rope_type": "longrope", "short_factor": [1.0]}, {}, "longrope depends on the length of the sequence at hand"),
    ({"rope_type": "yarn", "factor": 2.0}, {}, "original_max_position_embeddings: is missing, and rope_type yarn needs it; give"),
    (YARN | {"beta_fats": 32}, {}, "model.rope_scaling.beta_fats: is no name of rope_type yarn; the nearest is beta_fast, all are"),
    (LINEAR | {"original_max_position_embeddings": 2048}, {}, "is no name of rope_type linear; the nearest is"),
    ({"rope_type": "default", "factor": 4.0}, {}, "model.rope_scaling.factor: is no name of rope_type default"),
    (YARN | {"factor": 0.5}, {}, "model.rope_scaling.factor: is 0.5, which would shorten the model's positions; give a number ≥ 1"),
    (YARN | {"factor": "4x"}, {}, "model.rope_scaling.factor: is '4x'; give a number > 0"),
    (YARN | {"factor": True}, {}, "model.rope_scaling.factor: is True; give a number > 0"),
    (YARN | {"factor": float("nan")}, {}, "model.rope_scaling.factor: is nan; give a number > 0"),
    (YARN | {"attention_factor": None}, {}, "model.rope_scaling.attention_factor: is None; give a number > 0"),
    (YARN | {"truncate": 1}, {}, "model.rope_scaling.truncate: is 1; give true or false"),
    (YARN | {"original_max_position_embeddings": 2e3}, {}, "is 2000.0; give a whole number of tokens ≥ 1"),
    (YARN | {"beta_slow": 40}, {}, "model.rope_scaling.beta_slow: 40 is not below beta_fast 32; give a smaller beta_slow"),
    (LLAMA3 | {"high_freq_factor": 1}, {}, "model.rope_scaling.low_freq_factor: 1 is not below high_freq_factor 1"),
    (YARN | {"mscale": 1.0}, {}, "model.rope_scaling.mscale: transformers reads mscale and mscale_all_dim only together"),
    (YARN | {"original_max_position_embeddings": 4096}, {}, "is 4096, and {file} has max_position_embeddings 2048; give at most"),
    (
        YARN | {"original_max_position_embeddings": 1024, "factor": 8},
        OWN_YARN,
        "is 1024, and {file} says that the model was pretrained on 2048; give 2048",
    ),
    (
        YARN,
        OWN_YARN | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        "model.rope_scaling: leaves out mscale 1.0 and mscale_all_dim 0.5 of {file}, and without attention has another temperature",
    ),
]


@pytest.mark.parametrize(("scaling", "model", "expected"), BAD, ids=range(len(BAD)))
def test_bad_scalings_are_one_line(tmp_path: Path, scaling: dict[str, Any], model: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(build(tmp_path, scaling, **model), 1)
    assert expected.format(file=tmp_path / "config.json") in str(refused.value)
    assert str(refused.value).startswith("model.rope_scaling")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("scaling", "tokens", "model", "expected"),
    [
        (
            None,
            2049,
            {},
            "2048 of model.path {path}; shorten the sequences or give a model with more positions, or set model.rope_sc",
        ),
        (
            YARN,
            8193,
            {},
            "8192 of model.path {path} under model.rope_scaling; shorten the sequences or raise model.rope_scaling.factor",
        ),
        (LINEAR, 8193, {}, "8192 of model.path {path} under model.rope_scaling; shorten the sequences or raise"),
        (LLAMA3, 8193, {}, "8192 of model.path {path} under model.rope_scaling"),
        # an exported folder of a run with linear scaling has its factor in max_position_embeddings
        (
            LINEAR,
            8193,
            {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "8192 of model.path {path} under model.rope_scaling",
        ),
        # a table of factor × original positions is all that vLLM makes for yarn
        (YARN | {"original_max_position_embeddings": 256}, 1025, {}, "1024 of model.path {path} under model.rope_scaling"),
        # without its own scaling the model has what it was pretrained on
        (
            {"rope_type": "default"},
            2049,
            OWN_YARN,
            "2048 of model.path {path} under model.rope_scaling; shorten the sequences or choose",
        ),
    ],
)
def test_sequences_must_fit_into_the_scaled_positions(
    tmp_path: Path, scaling: dict[str, Any] | None, tokens: int, model: dict[str, Any], expected: str
) -> None:
    check(build(tmp_path, scaling, tokens - 1, **model), 1)
    with pytest.raises(ConfigError) as refused:
        check(build(tmp_path, scaling, tokens, **model), 1)
    assert f"= {tokens} tokens exceed max_position_embeddings {expected.format(path=tmp_path)}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "scaling", "model", "expected"),
    [
        (
            "sglang",
            YARN | {"attention_factor": 1.2},
            {},
            "sglang reads no attention_factor of RoPE, and {path} has 1.2; use vllm or",
        ),
        (
            "vllm",
            YARN | {"attention_factor": 1.0},
            DEEPSEEK,
            "vllm reads no attention_factor of deepseek_v3's RoPE, and {path} has 1.0",
        ),
        ("sglang", YARN | {"truncate": False}, DEEPSEEK, "sglang reads no truncate of deepseek_v3's RoPE, and {path} has False"),
        ("vllm", LINEAR, DEEPSEEK, "vllm takes any scaling of deepseek_v3's RoPE for yarn, and {path} has rope_type 'linear'"),
        (
            "sglang",
            YARN,
            {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2},
            "sglang does not scale mixtral's RoPE, and {path} has rope_type 'yarn'; use vllm or embedded",
        ),
    ],
)
def test_engines_must_scale_alike(
    tmp_path: Path, engine: str, scaling: dict[str, Any], model: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(build(tmp_path, scaling, engine=engine, **model), 1)
    assert expected.format(path=tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
    check(build(tmp_path, scaling, **model), 1)


def test_a_reference_of_its_own_keeps_its_positions(tmp_path: Path) -> None:
    """The scaling is the policy's, and that of models which start from its folder."""
    config = build(tmp_path, YARN)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(MODEL))
    (other / "model.safetensors").touch()
    values = config.model_dump() | {"algorithm": {"kl": {"place": "loss", "coefficient": 0.1}}}
    role = {"max_tokens_per_micro_batch": 10**6}
    check(Config.model_validate(values | {"reference": role}), 1)
    with pytest.raises(ConfigError, match=f"8192 tokens exceed max_position_embeddings 2048 of reference.path {other}; shorten"):
        check(Config.model_validate(values | {"reference": role | {"path": other}}), 1)
