"""Presets under the user's keys, choices that clash, and choices that cannot run yet."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.checks.algorithm import CLASHES, check_algorithm
from megarl.config.load import dump_config, load_config
from megarl.config.schema import AlgorithmConfig, Config
from megarl.config.schema.algorithm import PRESETS, PRESETS_FOLDER
from megarl.errors import ConfigError

BASE: dict[str, Any] = {
    "kind": "rl",
    "steps": 1,
    "model": {"path": "model"},
    "data": {"train": {"type": "jsonl", "path": "a.jsonl"}},
}
TEXT = "kind: rl\nsteps: 1\nmodel: {path: model}\ndata: {train: {type: jsonl, path: a.jsonl}}\n"


def lines(algorithm: dict[str, Any], **rollout: int) -> list[str]:
    return list(check_algorithm(Config.model_validate(BASE | {"algorithm": algorithm, "rollout": rollout})))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_taken_as_written_and_runs_or_says_what_it_needs(name: str) -> None:
    written = yaml.safe_load((PRESETS_FOLDER / f"{name}.yaml").read_text())
    config = AlgorithmConfig.model_validate({"preset": name})
    for key, value in written.items():
        actual = getattr(config, key)
        if isinstance(value, dict):
            assert {inner: getattr(actual, inner) for inner in value} == value
        else:
            assert actual == value
    assert {"advantage", "ratio", "surrogate", "aggregation", "kl"} <= set(written), "a preset names its choice on every axis"
    found = lines({"preset": name})
    if config.advantage == "group_mean_task_std":
        (line,) = found
        assert line.startswith(
            "algorithm.advantage: group_mean_task_std needs a mixture of several tasks, and data.train holds one"
        )
    else:
        assert found == []


def test_the_user_s_keys_go_before_the_preset_s(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT + "algorithm: {preset: dapo, clip: {high: 0.3}, aggregation: sequence_mean}\n")
    algorithm = load_config(file).algorithm
    assert (algorithm.clip.low, algorithm.clip.high, algorithm.aggregation) == (0.2, 0.3, "sequence_mean")
    assert algorithm.dynamic_sampling and algorithm.mask_truncated and algorithm.reward_shaping.overlong_buffer == 0.2
    algorithm = load_config(file, ["algorithm.preset=gspo", "algorithm.clip.low=0.1"]).algorithm
    assert (algorithm.ratio, algorithm.clip.low, algorithm.clip.high) == ("sequence", 0.1, 0.3)
    resolved = load_config(file)
    (tmp_path / "resolved.yaml").write_text(dump_config(resolved))
    assert load_config(tmp_path / "resolved.yaml") == resolved


def test_the_defaults_are_grpo_without_kl() -> None:
    assert AlgorithmConfig.model_validate(
        {"preset": "grpo", "kl": {"place": "none", "coefficient": 0.0}}
    ) == AlgorithmConfig().model_copy(update={"preset": "grpo"})


@pytest.mark.parametrize(
    ("key", "value", "start"),
    [
        ("preset", "drgrpo", "algorithm.preset: is 'drgrpo'; give `aepo` or `cispo` or `dapo` or `dr_grpo` or"),
        ("advantage", "mean", "algorithm.advantage: is 'mean'; give `group_mean_std` or `group_mean` or `leave_one_out` or"),
        ("surrogate", "a.b", "algorithm.surrogate: is 'a.b'; give `ppo_clip` or `gmpo` or `cispo` or `policy_gradient` or"),
        ("ratio", "tokens", "algorithm.ratio: is 'tokens'; give `token` or `sequence` or `sequence_token`: Importance ratio"),
        ("preset", 3, "algorithm.preset: is 3, input should be a valid string; give `aepo`"),
    ],
)
def test_unknown_names_are_one_line_with_all_names(tmp_path: Path, key: str, value: object, start: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    with pytest.raises(ConfigError) as caught:
        load_config(file, [f"algorithm.{key}={value}"])
    message = str(caught.value)
    assert message.startswith(f"--set: {start}") and "\n" not in message
    if key in ("advantage", "surrogate"):
        assert "or a function of your own, `module:function`" in message


def with_value(settings: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    section, _, name = path.rpartition(".")
    return settings | ({section: settings.get(section, {}) | {name: value}} if section else {name: value})


@pytest.mark.parametrize("clash", CLASHES, ids=lambda clash: f"{clash.first[0]}-{clash.second[0]}")
def test_clashes(clash: Any) -> None:
    (first, first_values), (second, second_values) = clash.first, clash.second
    for one in first_values:
        for other in second_values:
            settings = with_value(with_value({}, first, one), second, other)
            found = [line for line in lines(settings) if "do not go together" in line]
            expected = f"algorithm.{first}: {one} and algorithm.{second} {other} do not go together: {clash.reason}"
            assert expected in found
            assert re.search(r"; set .+|; choose .+", expected), "a clash says what to do"


@pytest.mark.parametrize(
    ("settings", "rollout", "expected"),
    [
        ({"advantage": "process_rewards"}, {}, "algorithm.advantage: process_rewards needs a reward for each step"),
        (
            {"preset": "remax", "reward_shaping": {"length_weight": 0.1}},
            {},
            "algorithm.reward_shaping.length_weight: is 0.1, and the length reward compares a prompt's sampled responses with each "
            "other, so the greedy one that algorithm.advantage greedy_baseline needs has none; set it to 0",
        ),
        ({"kl": {"place": "reward", "estimator": "k1"}}, {}, "algorithm.kl.coefficient: is 0 with kl.place reward"),
        *(
            (
                {"preset": preset, "sampler_correction": {"method": method, "level": "token"}},
                {},
                f"algorithm.sampler_correction.level: token with algorithm.{choice}, whose loss is one term of a whole response",
            )
            for preset, choice in (
                ("kimi_k1_5", "surrogate mirror_descent"),
                ("gmpo", "surrogate gmpo"),
                ("gspo", "ratio sequence"),
            )
            for method in ("tis", "mis")
        ),
        *(
            (
                {"preset": preset, "updates_per_step": 2},
                {},
                "algorithm.updates_per_step: 2 with surrogate policy_gradient, which has no importance ratio",
            )
            for preset in ("rloo", "remax", "reinforce")
        ),
        ({"kl": {"coefficient": 0.1}}, {}, "algorithm.kl.coefficient: is 0.1 but kl.place is none"),
        ({"kl": {"target": 6.0}}, {}, "algorithm.kl.target: is 6 but kl.place is none"),
        (
            {"preset": "cispo", "clip": {"dual": 3.0}},
            {},
            "algorithm.clip.dual: is 3 and only surrogate ppo_clip uses it, not cispo",
        ),
        ({"clip": {"dual": 1.1}}, {}, "algorithm.clip.dual: 1.1 is not above the clip range's 1 + 0.2"),
        ({"entropy_control": {"low": 0.5, "high": 0.5}}, {}, "algorithm.entropy_control.low: 0.5 is not below high 0.5"),
        (
            {"preset": "rloo"},
            {"samples_per_prompt": 1},
            "rollout.samples_per_prompt: 1 response per prompt makes every advantage 0",
        ),
        (
            {"advantage": "reward_to_go", "dynamic_sampling": True},
            {"samples_per_prompt": 1},
            "algorithm.dynamic_sampling would never fill a step",
        ),
        (
            {"preset": "reinforce_pp"},
            {"samples_per_prompt": 1, "prompts_per_step": 1},
            "rollout.prompts_per_step: 1 response in a step leaves nothing to compare with algorithm.whiten true",
        ),
    ],
)
def test_one_line_for_each_mistake(settings: dict[str, Any], rollout: dict[str, int], expected: str) -> None:
    (line,) = lines(settings, **rollout)
    assert expected in line and "; " in line


def test_what_needs_no_group_runs_with_one_response() -> None:
    for preset in ("reinforce", "reinforce_pp", "remax"):
        assert lines({"preset": preset}, samples_per_prompt=1) == []
    assert lines({"preset": "remax", "dynamic_sampling": True}, samples_per_prompt=1) == []
    assert lines({"advantage": "my.module:advantage", "surrogate": "my_module:loss"}) == []
