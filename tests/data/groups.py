"""Groups of responses that have nothing but rewards."""

from megarl.types import FinishReason, Rollout, RolloutGroup, ScoredRollout


def answered(prompt, rewards):
    """A group with these rewards."""
    empty = {"token_ids": (), "from_policy": (), "logprobs": (), "weight_versions": (), "text": ""}
    rollouts = [
        ScoredRollout(
            rollout=Rollout(prompt=prompt, sample_index=index, finish_reason=FinishReason.STOP, **empty),
            reward=reward,
            parts={},
            step_rewards=(),
            failures=(),
        )
        for index, reward in enumerate(rewards)
    ]
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), greedy=None)
