"""The rollouts of one step, on their way to the update."""

from dataclasses import dataclass, replace

from megarl.observe.rollout_metrics import rollout_metrics
from megarl.train.roles import RewardModel
from megarl.types import PackedBatch, RolloutGroup, ScoredRollout, Tickets


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The rollouts of one step, scored.

    Attributes:
        packed: the batch, on every rank.
        groups: the same as people read it, on rank 0; empty elsewhere.
        metrics: what was seen while sampling and scoring, on rank 0.
        score_seconds: of ``collect``, in which nothing was generated, only scored or waited for environments; on rank 0, and 0
            where generation runs beside training.
        tickets: which groups the step used up, on rank 0; None where responses do not outlive a step.
        reward_mean: over all responses that the step sampled, those of dropped groups included, on every rank.
    """

    packed: PackedBatch
    groups: tuple[RolloutGroup, ...]
    metrics: dict[str, float]
    score_seconds: float
    tickets: Tickets | None
    reward_mean: float


def add_model_rewards(collected: Collected, reward_model: RewardModel) -> Collected:
    """Add the reward model's rewards to the scorers', for training and for people; every rank calls it."""
    rewards = reward_model.rewards(collected.packed)
    packed = replace(collected.packed, rewards=collected.packed.rewards + reward_model.weight * rewards)
    remaining = iter(rewards.tolist())

    def scored(rollout: ScoredRollout) -> ScoredRollout:
        reward = next(remaining)
        parts = {**rollout.parts, "reward_model": reward}
        return replace(rollout, reward=rollout.reward + reward_model.weight * reward, parts=parts)

    groups = tuple(replace(group, rollouts=tuple(map(scored, group.rollouts))) for group in collected.groups)
    metrics = collected.metrics | (rollout_metrics(groups) if groups else {})
    mean = float(packed.rewards.double().mean())
    return replace(collected, packed=packed, groups=groups, metrics=metrics, reward_mean=mean)
