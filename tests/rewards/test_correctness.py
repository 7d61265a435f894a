"""Which responses count as correct for the length reward, whatever the weights of the scores."""

from typing import Any

import pytest

from megarl.config.checks.algorithm import check_correctness
from megarl.config.schema import Config
from megarl.rewards.combine import correctness
from megarl.types import FinishReason, Prompt, Rollout, ScoredRollout

EXACT, FORMAT = {"type": "exact", "weight": 0.5}, {"type": "format", "tags": ["a"], "weight": 1.0}
JUDGE, CODE = {"type": "python", "name": "judge", "function": "a:b"}, {"type": "python", "name": "code", "function": "a:c"}


def config_of(scorers: list[dict[str, Any]], **shaping: Any) -> Config:
    return Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "model": {"path": "model"},
            "data": {"train": {"type": "jsonl", "path": "a.jsonl"}},
            "algorithm": {"reward_shaping": {"length_weight": 0.1} | shaping},
            "rewards": {"scorers": scorers},
        }
    )


def scored(reward: float, **parts: float) -> ScoredRollout:
    prompt = Prompt(prompt_id="train/0", token_ids=(1,), text="", reference={}, task="train")
    rollout = Rollout(
        prompt=prompt,
        sample_index=0,
        token_ids=(2,),
        from_policy=(True,),
        logprobs=(0.0,),
        weight_versions=(0,),
        finish_reason=FinishReason.STOP,
        text="",
    )
    return ScoredRollout(rollout=rollout, reward=reward, parts=parts, step_rewards=(), failures=())


@pytest.mark.parametrize(
    ("scorers", "shaping", "reward", "parts", "expected"),
    [
        ([EXACT, FORMAT], {}, 0.5, {"exact": 1.0, "format": 0.0}, True),  # right, and the reward is below 1
        ([EXACT, FORMAT], {}, 1.0, {"exact": 0.0, "format": 1.0}, False),  # wrong, and the reward is 1
        ([EXACT, FORMAT], {}, 1.0, {"format": 1.0}, False),  # the scorer failed
        ([EXACT, {"type": "math"}], {}, 1.0, {"exact": 0.0, "math": 1.0}, True),  # two ways to be right
        ([{**JUDGE, "weight": 5.0}], {}, 2.5, {"judge": 0.5}, False),  # the only one, not weighted
        ([JUDGE, EXACT], {"correct_scorers": ["judge"]}, 0.0, {"judge": 1.0, "exact": 0.0}, True),
        ([JUDGE, EXACT], {"correct_scorers": ["judge"]}, 1.0, {"judge": 0.0, "exact": 1.0}, False),
        ([JUDGE], {"correct_reward": 0.5}, 0.5, {"judge": 0.5}, True),
        ([], {}, 1.0, {}, True),  # an environment alone: the reward must tell
        ([], {}, 0.5, {}, False),
    ],
)
def test_correct_is_what_a_scorer_of_the_answer_says(
    scorers: list[dict[str, Any]], shaping: dict[str, Any], reward: float, parts: dict[str, float], expected: bool
) -> None:
    config = config_of(scorers, **shaping)
    assert correctness(config)(scored(reward, **parts)) is expected
    assert list(check_correctness(config)) == []


@pytest.mark.parametrize(
    ("scorers", "shaping", "expected"),
    [
        ([JUDGE, CODE], {}, "of the scorers judge, code of task train none is known to say that an answer is right"),
        ([EXACT], {"correct_scorers": ["exakt"]}, "no scorer of the training tasks is called 'exakt'; give names among exact"),
    ],
)
def test_nobody_says_what_is_right(scorers: list[dict[str, Any]], shaping: dict[str, Any], expected: str) -> None:
    (line,) = check_correctness(config_of(scorers, **shaping))
    assert line.startswith("algorithm.reward_shaping.correct_scorers: ") and expected in line
    assert list(check_correctness(config_of(scorers, **shaping, length_weight=0))) == []
