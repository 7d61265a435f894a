"""Scored rollouts written by hand."""

from collections.abc import Sequence

from megarl.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout


def group(
    name: str,
    rewards: Sequence[float],
    *,
    responses: Sequence[Sequence[int]] | None = None,
    reasons: Sequence[FinishReason] | None = None,
    failures: Sequence[tuple[str, ...]] | None = None,
    greedy: ScoredRollout | None = None,
    task: str = "train",
) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, token_ids=(1, 2, 3), text=f"prompt {name}", reference={}, task=task)
    scored = []
    for index, reward in enumerate(rewards):
        token_ids = tuple(responses[index]) if responses else (5, 6)
        rollout = Rollout(
            prompt=prompt,
            sample_index=index,
            token_ids=token_ids,
            from_policy=(True,) * len(token_ids),
            logprobs=(-0.5,) * len(token_ids),
            weight_versions=(7,) * len(token_ids),
            finish_reason=reasons[index] if reasons else FinishReason.STOP,
            text=f"antwoord é {name}.{index}",
        )
        failed = failures[index] if failures else ()
        scored.append(ScoredRollout(rollout=rollout, reward=reward, parts={"exact": reward}, step_rewards=(), failures=failed))
    return RolloutGroup(prompt=prompt, rollouts=tuple(scored), greedy=greedy)
