"""A curriculum's stages: what each becomes, and every refusal as one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config.checks import check
from megarl.config.load import dump_config
from megarl.config.schema import Config
from megarl.config.stages import PlannedUpdates, planned_updates, stages_of
from megarl.config.yaml_text import parse
from megarl.errors import ConfigError
from small_model import MODEL

STAGES: list[dict[str, Any]] = [
    {"name": "short", "steps": 4, "max_prompt_tokens": 256},
    {
        "name": "long",
        "steps": 6,
        "max_prompt_tokens": 1024,
        "changes": {"policy": {"parallel": {"cp": 2}}, "rollout": {"max_new_tokens": 64}},
    },
]


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return {
        "kind": "rl",
        "steps": 10,
        "model": {"path": str(tmp_path), "init": "random"},
        "policy": {"recompute": "full"},
        "rollout": {"max_new_tokens": 32},
        "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}},
        "rewards": {"scorers": [{"type": "exact"}]},
        "curriculum": {"stages": [dict(stage) for stage in STAGES]},
    }


def test_a_stage_is_the_run_with_its_changes(run: dict[str, Any]) -> None:
    config = Config.model_validate(run)
    check(config, 2)
    short, long = stages_of(config)
    assert (short.above, short.max_prompt_tokens, long.above, long.max_prompt_tokens) == (0, 256, 256, 1024)
    assert (short.config.policy.parallel.cp, long.config.policy.parallel.cp) == (1, 2)
    assert (short.config.rollout.max_new_tokens, long.config.rollout.max_new_tokens) == (32, 64)
    assert (short.config.rollout.max_prompt_tokens, long.config.rollout.max_prompt_tokens) == (256, 1024)
    assert long.config.policy.recompute == "full" and long.config.curriculum is None and long.config.steps == 10
    saved = Config.model_validate(parse(dump_config(config)))
    assert [stage.config for stage in stages_of(saved)] == [short.config, long.config]


@pytest.mark.parametrize(("warmup", "policy"), [(0, 4 * 2 + 6 * 4), (3, 1 * 2 + 6 * 4), (5, 5 * 4)])
def test_schedules_are_as_long_as_all_stages_updates(run: dict[str, Any], warmup: int, policy: int) -> None:
    """Stages of 4 and 6 steps with 2 and 4 updates; in the run's first steps the critic alone learns."""
    run["algorithm"] = {"preset": "ppo", "updates_per_step": 2}
    run["critic"] = {"warmup_steps": warmup}
    run["curriculum"]["stages"][1]["changes"] = {"algorithm": {"updates_per_step": 4}}
    config = Config.model_validate(run)
    assert planned_updates(config, stages_of(config)) == PlannedUpdates(policy=policy, critic=4 * 2 + 6 * 4)
    assert planned_updates(config) == PlannedUpdates(policy=2 * (10 - warmup), critic=2 * 10)


def test_a_stages_preset_is_the_whole_method(run: dict[str, Any]) -> None:
    """Keys of the run's method do not linger, in the file as written and in the one that the run saves."""
    run["algorithm"] = {"preset": "dr_grpo", "clip": {"high": 0.5}}
    run["curriculum"]["stages"][1]["changes"] = {"algorithm": {"preset": "dapo", "max_sampling_waves": 3}}
    config = Config.model_validate(run)
    expected = Config.model_validate(
        {**run, "curriculum": None, "algorithm": {"preset": "dapo", "max_sampling_waves": 3}}
    ).algorithm
    for one in (config, Config.model_validate(parse(dump_config(config)))):
        assert stages_of(one)[1].config.algorithm == expected
    assert (expected.clip.high, expected.dynamic_sampling) == (0.28, True)


ASYNCHRONOUS = {"rollout": {"asynchronous": {"max_staleness": 1}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 9}, "steps: 9 is not the sum of the stages' steps, 4 + 6 = 10"),
        ({"kind": "sft"}, "curriculum: is given and kind sft has no stages"),
        ({1: {"max_prompt_tokens": 100}}, "curriculum.stages.1.max_prompt_tokens: 100 is below the 256 of stage 0"),
        ({1: {"name": "short"}}, "curriculum.stages.1.name: 'short' is also the name of stage 0"),
        ({0: {"promotion": {}}}, "curriculum.stages.0.promotion: has no rule"),
        (
            {0: {"promotion": {"plateau_window": 3}}},
            "stages.0.promotion.plateau_window: twice 3 steps never fit into",
        ),
        ({0: {"promotion": {"accuracy": 0.5}}}, "stages.0.promotion.accuracy: needs evaluations during the stage"),
        ({0: {"promotion": {"min_steps": 5, "plateau_window": 1}}}, "stages.0.promotion.min_steps: 5 exceeds the stage's 4 steps"),
        ({1: {"changes": {"seed": 1}}}, "curriculum.stages.1.changes.seed: cannot change between stages"),
        ({1: {"changes": {"model": {"dtype": "bfloat16"}}}}, "stages.1.changes.model.dtype: cannot change between stages"),
        ({1: {"changes": {"rollout": 3}}}, "curriculum.stages.1.changes.rollout: is 3; give a section"),
        ({1: {"changes": {"rollout": {"max_prompt_tokens": 9}}}}, "rollout.max_prompt_tokens: is the stage's own"),
        (
            {1: {"changes": {"rollout": {"max_new_token": 9}}}},
            "curriculum.stages.1.changes: rollout.max_new_token: unknown key; the nearest valid key is rollout.max_new_tokens",
        ),
        ({1: {"changes": {"algorithm": {"preset": "ppo"}}}}, "stages.1.changes.algorithm.advantage: differs from stage 0's"),
        ({1: {"changes": ASYNCHRONOUS}}, "stages.1.changes.rollout.asynchronous: differs from stage 0's"),
        (
            {1: {"changes": {"policy": {"parallel": {"distributed_optimizer": False}}}}},
            "stages.1.changes.policy.parallel.distributed_optimizer: differs from stage 0's",
        ),
        ({1: {"changes": {"policy": {"parallel": {"cp": 3}}}}}, "curriculum.stages.1 (long): policy.parallel: world size 2"),
        (
            {1: {"max_prompt_tokens": 4000}},
            "curriculum.stages.1 (long): rollout.max_prompt_tokens 4000 + rollout.max_new_tokens 64 = 4064 tokens exceed "
            "max_position_embeddings 2048",
        ),
    ],
)
def test_refusals(run: dict[str, Any], changes: dict[Any, Any], message: str) -> None:
    for key, value in changes.items():
        if isinstance(key, int):
            run["curriculum"]["stages"][key].update(value)
        else:
            run[key] = value
    with pytest.raises(ConfigError) as refusal:
        check(Config.model_validate(run), 2)
    (line,) = str(refusal.value).splitlines()
    assert message in line


def test_a_share_of_earlier_prompts_needs_earlier_lengths(run: dict[str, Any]) -> None:
    run["curriculum"]["stages"][1]["max_prompt_tokens"] = 256
    check(Config.model_validate(run), 2)
    run["curriculum"]["retrospective_share"] = 0.25
    with pytest.raises(ConfigError, match=r"retrospective_share: is 0.25 and all stages have the same prompts"):
        check(Config.model_validate(run), 2)


def test_a_mistake_of_all_stages_is_said_once(run: dict[str, Any]) -> None:
    run["rewards"] = {"scorers": []}
    with pytest.raises(ConfigError) as refusal:
        check(Config.model_validate(run), 2)
    assert len(str(refusal.value).splitlines()) == 1
