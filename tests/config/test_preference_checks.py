"""Refusals of kinds preference and reward_model: one line that names the key, the values and the fix."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config.checks import check
from megarl.config.schema import Config
from megarl.errors import ConfigError
from small_model import MODEL


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in MODEL.items() if value is not None}))
    (tmp_path / "rows.jsonl").touch()
    source = {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    model = {"path": str(tmp_path), "init": "random"}
    return {"kind": "preference", "steps": 10, "model": model, "data": {"train": source, "template": "{prompt}"}}


def build(values: dict[str, Any], settings: dict[str, Any]) -> Config:
    data = copy.deepcopy(values)
    for path, value in settings.items():
        *sections, name = path.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return Config.model_validate(data)


GYM = {"type": "reasoning_gym", "task": "chain_sum"}


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({}, 1),
        ({"preference.loss": "robust", "preference.label_smoothing": 0.1}, 1),
        ({"preference.loss": "simpo", "preference.simpo_margin": 0.0, "rollout.max_new_tokens": 50000}, 1),
        ({"kind": "reward_model", "preference.reward_margin": 1.0, "preference.reward_centering": 0.01}, 1),
        ({"policy.num_ranks": 1, "reference": {"first_rank": 1}, "reference.parallel.tp": 2}, 3),
        ({"policy.parallel.cp": 2, "evaluation.every": 2, "evaluation.data": {"type": "jsonl", "path": __file__}}, 2),
    ],
)
def test_good_configs_pass(values: dict[str, Any], settings: dict[str, Any], world_size: int) -> None:
    check(build(values, settings), world_size)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"preference.loss": "robust"}, "preference.label_smoothing: is 0, with which robust is dpo; set it to"),
        (
            {"preference.loss": "ipo", "preference.label_smoothing": 0.1},
            "preference.label_smoothing: is 0.1 and loss ipo has none; set it to 0, or loss to dpo or robust",
        ),
        ({"preference.loss": "simpo"}, "preference.simpo_margin: is required for loss simpo; give for example 1.0"),
        ({"preference.simpo_margin": 1.0}, "preference.simpo_margin: is 1 and loss dpo has none; remove it, or set loss to simpo"),
        (
            {"preference.loss": "orpo", "reference": {}},
            "reference: is given and preference.loss orpo compares with no reference; remove it",
        ),
        ({"data.train": GYM}, "data.train.type: reasoning_gym has no rejected responses; give jsonl or datasets"),
        ({"evaluation.data": GYM}, "evaluation.data.type: reasoning_gym has no rejected responses"),
        ({"critic": {}}, "critic: is given and kind preference has no critic; remove it"),
        ({"reward_model": {"path": "absent"}}, "reward_model: is given and kind preference has no rewards; remove it"),
        ({"rollout.asynchronous": {}}, "rollout.asynchronous: is given and kind preference samples nothing to train on"),
        ({"rollout.environment": {"type": "calculator"}, "rollout.environment.observation_template": "{observation}"}, "rollout."),
        (
            {"curriculum": {"stages": [{"name": "a", "steps": 1, "max_prompt_tokens": 5}]}},
            "curriculum: is given and kind preference has no",
        ),
        ({"data.sampling.order": "prioritised"}, "data.sampling.order: prioritised draws rows by how often the policy solves them"),
        ({"preference.max_tokens": 2049}, "preference.max_tokens 2049 exceed max_position_embeddings 2048"),
        (
            {"preference.max_tokens": 100, "policy.max_tokens_per_micro_batch": 99},
            "policy.max_tokens_per_micro_batch: 99 tokens cannot hold the longest sequence (preference.max_tokens 100)",
        ),
        ({"reference": {"max_tokens_per_micro_batch": 99}}, "reference.max_tokens_per_micro_batch: 99 tokens cannot hold"),
        ({"reference": {"path": "absent"}}, "reference.path: absent"),
        ({"preference.reward_margin": 1.0}, "preference.reward_margin: is 1 and has no use for kind preference; remove it"),
        (
            {"kind": "reward_model", "preference.loss": "ipo"},
            "preference.loss: is ipo and has no use for kind reward_model; remove it",
        ),
        ({"kind": "reward_model", "reference": {}}, "reference: is given and kind reward_model compares with no reference"),
        (
            {"kind": "reward_model", "reward_model": {"path": "absent"}},
            "reward_model: is given and kind reward_model has no rewards",
        ),
        ({"kind": "reward_model", "data.train": GYM}, "data.train.type: reasoning_gym has no rejected responses"),
        ({"kind": "reward_model", "model.init": "pretrained"}, "model.path: "),
        (
            {"kind": "reward_model", "preference.max_tokens": 100, "policy.max_tokens_per_micro_batch": 100},
            "policy.max_tokens_per_micro_batch: 100 tokens cannot hold the longest sequence (preference.max_tokens 100)",
        ),
        ({"optimizer.warmup_steps": 11}, "optimizer.warmup_steps: 11 optimizer steps exceed the run's steps 10"),
    ],
)
def test_refusals(values: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(build(values, settings), 1)
    (line,) = str(caught.value).split("\n")
    assert line.startswith(expected), line


def test_label_smoothing_below_a_half(values: dict[str, Any]) -> None:
    for settings in ({"preference.label_smoothing": 0.5}, {"preference.beta": 0.0}):
        with pytest.raises(ValueError, match="preference"):
            build(values, settings)
