"""Settings without effect: each is named, once and in one line, and nothing that a method, a preset or a config uses is."""

from pathlib import Path
from typing import Any

import pytest

from megarl.config.load import dump_config, load_config
from megarl.config.schema.algorithm import PRESETS
from megarl.config.unused_settings import unused_settings

TEXT = "kind: {kind}\nsteps: 4\nmodel: {{path: model}}\ndata: {{train: {{type: jsonl, path: a.jsonl}}}}\n"
CONFIGS = Path(__file__).parents[2] / "configs"


def lines(folder: Path, overrides: list[str], kind: str = "rl") -> list[str]:
    file = folder / "run.yaml"
    file.write_text(TEXT.format(kind=kind))
    config = load_config(file, overrides)
    found = unused_settings(config)
    (folder / "resolved.yaml").write_text(dump_config(config))
    assert unused_settings(load_config(folder / "resolved.yaml")) == found, "a resolved config says as much"
    return found


CASES: list[tuple[str, list[str], str, str]] = [
    ("rl", ["algorithm.preset=rloo"], "algorithm.clip.low=0.3", "a surrogate that clips"),
    ("rl", ["algorithm.preset=kimi_k1_5"], "algorithm.clip.high=0.3", "a surrogate that clips"),
    ("rl", [], "algorithm.mirror_descent_tau=0.5", "surrogate: mirror_descent"),
    ("rl", [], "algorithm.gae.trace_decay=0.9", "advantage: gae"),
    ("rl", [], "algorithm.value_clip=0.5", "advantage: gae"),
    (
        "rl",
        ["algorithm.preset=ppo", "algorithm.gae.length_adaptive_alpha=0.05"],
        "algorithm.gae.trace_decay=0.9",
        "length_adaptive",
    ),
    ("rl", [], "algorithm.kl.estimator=k1", "kl.place: reward or loss"),
    ("rl", ["algorithm.preset=grpo"], "algorithm.kl.adaptation_rate=0.2", "kl.target"),
    ("rl", [], "algorithm.sampler_correction.cap=3.0", "sampler_correction.method: tis or mis"),
    ("rl", [], "algorithm.sampler_correction.level=sequence", "sampler_correction.method: tis or mis"),
    ("rl", [], "algorithm.reward_shaping.length_start=5", "reward_shaping.length_weight"),
    ("rl", [], "algorithm.reward_shaping.correct_reward=0.5", "reward_shaping.length_weight"),
    ("rl", [], "algorithm.max_sampling_waves=3", "dynamic_sampling: true"),
    ("rl", ["steps=1", "optimizer.warmup_steps=1"], "optimizer.learning_rate=0.001", "the first of a warm-up, which starts from 0"),
    ("rl", [], "optimizer.min_learning_rate=1e-08", "a schedule that decays"),
    ("rl", [], "data.sampling.priority_floor=0.1", "data.sampling.order: prioritised"),
    ("rl", [], "evaluation.temperature=0.5", "evaluation.data of prompts"),
    ("rl", [], "rollout.vllm.port=8000", "rollout.engine: vllm"),
    ("rl", [], "rollout.weight_transfer.max_restarts=3", "an engine server"),
    ("rl", [], 'reference={"first_rank": 1}', "a KL term, observe.kl_reference"),
    ("rl", [], "sft.max_tokens=99", "kind: sft"),
    ("rl", [], "preference.beta=0.2", "kinds preference and reward_model"),
    ("rl", [], "data.response_suffix=x", "kinds that train on given responses"),
    ("sft", [], "algorithm.clip.high=0.3", "kind: rl"),
    ("sft", [], "rollout.temperature=0.7", "kind: rl, or kind: sft with evaluation.data"),
    ("preference", [], "rewards.timeout=3", "kind: rl, or kind: sft with evaluation.data"),
]


@pytest.mark.parametrize(("kind", "others", "setting", "only"), CASES)
def test_one_line_for_a_setting_without_effect(tmp_path: Path, kind: str, others: list[str], setting: str, only: str) -> None:
    assert lines(tmp_path, others, kind) == []
    (line,) = lines(tmp_path, [*others, setting], kind)
    key, _, value = setting.partition("=")
    shown = "given" if value.startswith("{") else value.removesuffix(".0")
    assert line.startswith(f"{key}: is {shown} and has no effect: only ") and only in line and len(line) <= 300


def used() -> list[Any]:
    return [
        ["algorithm.clip.low=0.3"],
        ["algorithm.preset=gmpo", "algorithm.clip.high=0.3"],
        ["algorithm.surrogate=my:loss", "algorithm.clip.high=0.3", "algorithm.mirror_descent_tau=0.3"],
        ["algorithm.preset=ppo", "algorithm.gae.trace_decay=0.9", "algorithm.value_clip=0.5"],
        ["algorithm.preset=grpo", "algorithm.kl.target=6.0", "algorithm.kl.adaptation_rate=0.2"],
        ["algorithm.sampler_correction.method=tis", "algorithm.sampler_correction.cap=3.0"],
        ["algorithm.preset=kimi_k1_5", "algorithm.reward_shaping.length_start=5"],
        ["algorithm.preset=dapo", "algorithm.max_sampling_waves=3"],
        ["optimizer.schedule=linear", "optimizer.min_learning_rate=1e-8"],
        ["rollout.engine=vllm", "rollout.vllm.port=8000", "rollout.weight_transfer.max_restarts=3"],
        *([f"algorithm.preset={name}"] for name in PRESETS),
    ]


@pytest.mark.parametrize("overrides", used(), ids=str)
def test_what_has_an_effect_is_not_named(tmp_path: Path, overrides: list[str]) -> None:
    assert lines(tmp_path, overrides) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_shipped_configs_have_none(path: Path) -> None:
    assert unused_settings(load_config(path)) == []
