"""When a stage of a curriculum is over."""

import json

import pytest

from megarl.config.schema import Config, PromotionConfig
from megarl.config.stages import Stage
from megarl.errors import CheckpointError
from megarl.loop.promotion import StageProgress

CONFIG = Config.model_validate(
    {"kind": "rl", "steps": 9, "model": {"path": "model"}, "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}}}
)


def stage(steps: int = 9, name: str = "first", **promotion: float) -> Stage:
    rules = PromotionConfig.model_validate(promotion) if promotion else None
    return Stage(number=0, name=name, config=CONFIG, steps=steps, above=0, max_prompt_tokens=8, promotion=rules)


def steps_until_over(progress: StageProgress, rewards: list[float], accuracies: dict[int, float] | None = None) -> int:
    for step, reward in enumerate(rewards, start=progress.start_step + progress.num_steps + 1):
        progress.observe(step, reward, (accuracies or {}).get(step))
        if progress.is_over:
            return step
    return 0


@pytest.mark.parametrize(
    ("rules", "rewards", "accuracies", "last"),
    [
        ({}, [1.0] * 9, {11: 1.0}, 19),
        ({"accuracy": 0.8}, [0.0] * 9, {12: 0.79, 14: 0.8}, 14),
        ({"accuracy": 0.8, "min_steps": 6}, [0.0] * 9, {12: 0.9, 14: 0.9, 16: 0.9}, 16),
        # means of two steps: 0.15 → 0.35, 0.25 → 0.45 … gain 0.2 each, then 0.55 → 0.6
        ({"plateau_window": 2, "plateau_gain": 0.1}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6], {}, 18),
        ({"plateau_window": 2, "plateau_gain": 0.1, "accuracy": 0.5}, [0.1, 0.2, 0.3, 0.4, 0.5], {13: 0.6}, 13),
        # a fall is no gain
        ({"plateau_window": 1, "plateau_gain": 0.0}, [0.1, 0.3, 0.2], {}, 13),
    ],
)
def test_rules(rules: dict[str, float], rewards: list[float], accuracies: dict[int, float], last: int) -> None:
    assert steps_until_over(StageProgress(stage(**rules), start_step=10), rewards, accuracies) == last


def test_position_is_restored_and_another_curriculum_refused() -> None:
    rules = {"plateau_window": 2, "plateau_gain": 0.1}
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6]
    for cut in range(1, 8):
        progress = StageProgress(stage(**rules), start_step=10)
        assert steps_until_over(progress, rewards[:cut]) == 0
        resumed = StageProgress.restore([stage(**rules)], json.loads(json.dumps(progress.state())))
        assert steps_until_over(resumed, rewards[cut:]) == 18
    with pytest.raises(CheckpointError, match="is in stage 0, 'first', of its curriculum and this run has the stages other"):
        StageProgress.restore([stage(name="other")], progress.state())
