"""What is watched of the rollouts of a step."""

import math
from collections.abc import Sequence

import numpy as np

from megarl.types import FinishReason, Rollout, RolloutGroup

REPETITION_NGRAM = 4
REPETITION_LIMIT = 0.5


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Rewards, lengths, truncation and repetition over all sampled responses of a step.

    Args:
        groups: at least one, each with at least one response.

    Returns:
        ``reward_mean, reward_min, reward_max, reward_std`` (population), ``score_<scorer>`` (mean raw score),
        ``reward_mean/<task>`` and ``prompts/<task>`` (where there are several tasks),
        ``zero_variance_share`` (groups whose rewards, a greedy response's included, are all equal: they teach nothing),
        ``greedy_reward_mean`` (where there are greedy responses), ``response_length_mean`` and
        ``response_length_max`` (tokens that the policy sampled), ``truncated_share`` (responses that ended at max_new_tokens),
        ``repetition_stopped_share`` (responses ended by rollout.repetition_stop),
        ``reward_length_correlation`` (Pearson, over responses; NaN when either is constant), ``repetition_share`` (responses
        with a ``repetition`` above 0.5) and ``scorer_failures`` (count, a greedy response's and environments' included); with an
        environment also those of ``episode_metrics``.
    """
    scored = [rollout for group in groups for rollout in group.rollouts]
    assert scored, "no responses"
    greedy = [group.greedy for group in groups if group.greedy is not None]
    rewards = np.array([item.reward for item in scored])
    lengths = np.array([item.rollout.num_policy_tokens for item in scored], dtype=np.float64)
    metrics = {
        "reward_mean": rewards.mean(),
        "reward_min": rewards.min(),
        "reward_max": rewards.max(),
        "reward_std": rewards.std(),
        "zero_variance_share": np.mean([group.has_equal_rewards for group in groups]),
        "response_length_mean": lengths.mean(),
        "response_length_max": lengths.max(),
        "truncated_share": np.mean([item.rollout.finish_reason is FinishReason.LENGTH for item in scored]),
        "repetition_stopped_share": np.mean([item.rollout.finish_reason is FinishReason.REPETITION for item in scored]),
        "reward_length_correlation": correlation(rewards, lengths),
        "repetition_share": np.mean([repetition(_policy_tokens(item.rollout)) > REPETITION_LIMIT for item in scored]),
        "scorer_failures": sum(len(item.failures) for item in (*scored, *greedy)),
    }
    if greedy:
        metrics["greedy_reward_mean"] = np.mean([item.reward for item in greedy])
    by_task = groups_by_task(groups)
    if len(by_task) > 1:
        for task, own in by_task.items():
            metrics[f"reward_mean/{task}"] = np.mean([item.reward for group in own for item in group.rollouts])
            metrics[f"prompts/{task}"] = len(own)
    names = sorted({name for item in scored for name in item.parts})
    for name in names:
        metrics[f"score_{name}"] = np.mean([item.parts[name] for item in scored if name in item.parts])
    metrics |= episode_metrics([item.rollout for item in scored])
    return {name: float(value) for name, value in metrics.items()}


def groups_by_task(groups: Sequence[RolloutGroup]) -> dict[str, list[RolloutGroup]]:
    """Sort the groups by task, tasks in alphabetical order."""
    tasks = sorted({group.prompt.task for group in groups})
    return {task: [group for group in groups if group.prompt.task == task] for task in tasks}


def accuracy_metrics(groups: Sequence[RolloutGroup], threshold: float, samples_per_prompt: int) -> dict[str, float]:
    """``accuracy`` (pass@1), with several samples ``pass@2``, ``pass@4``, ... and ``pass@<samples>``, and all of these for each
    task (``accuracy/<task>``) of a mixture."""

    def rates(own: Sequence[RolloutGroup], suffix: str) -> dict[str, float]:
        accuracy, *others = pass_rates(own, threshold, samples_per_prompt).items()
        return {f"accuracy{suffix}": accuracy[1]} | {f"{name}{suffix}": value for name, value in others}

    by_task = groups_by_task(groups)
    metrics = rates(groups, "")
    if len(by_task) > 1:
        for task, own in by_task.items():
            metrics |= rates(own, f"/{task}")
    return metrics


def pass_rates(groups: Sequence[RolloutGroup], threshold: float, samples_per_prompt: int) -> dict[str, float]:
    """``pass@k`` for k = 1, 2, 4, 8, ... below the samples of a prompt, and for all of them."""
    numbers = [2**power for power in range(samples_per_prompt.bit_length()) if 2**power < samples_per_prompt]
    return {f"pass@{k}": pass_at_k(groups, k, threshold) for k in (*numbers, samples_per_prompt)}


def episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Measure episodes; nothing without an environment.

    Returns:
        ``turns_mean`` and ``turns_max`` (of the policy), ``out_of_turns_share`` (episodes that ended at max_turns),
        ``environment_token_share`` (of all tokens behind the prompts) and ``environment_seconds`` (an episode's wait for it, mean).
    """
    episodes = [rollout.episode for rollout in rollouts if rollout.episode is not None]
    if not episodes:
        return {}
    turns = [episode.num_turns for episode in episodes]
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    num_environment_tokens = num_tokens - sum(rollout.num_policy_tokens for rollout in rollouts)
    return {
        "turns_mean": float(np.mean(turns)),
        "turns_max": float(max(turns)),
        "out_of_turns_share": float(np.mean([episode.is_out_of_turns for episode in episodes])),
        "environment_token_share": num_environment_tokens / max(1, num_tokens),
        "environment_seconds": float(np.mean([episode.seconds for episode in episodes])),
    }


def _policy_tokens(rollout: Rollout) -> list[int]:
    return [token for token, is_sampled in zip(rollout.token_ids, rollout.from_policy, strict=True) if is_sampled]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two vectors; NaN when one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def repetition(token_ids: Sequence[int]) -> float:
    """Share of 4-grams that already stood in the response, 1 - unique / all (seq-rep-4, arXiv 1908.04319); 0 below 4 tokens."""
    count = len(token_ids) - REPETITION_NGRAM + 1
    if count < 1:
        return 0.0
    tokens = np.asarray(token_ids, dtype=np.int64)
    # Exact and fast: number the distinct pairs, then a 4-gram is two of those numbers.
    pairs, pair_ids = np.unique(tokens[:-1] << 32 | tokens[1:], return_inverse=True)
    return 1.0 - np.unique(pair_ids[:-2] * len(pairs) + pair_ids[2:]).size / count


def pass_at_k(groups: Sequence[RolloutGroup], k: int, threshold: float) -> float:
    """Mean over prompts of the unbiased pass@k, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    Args:
        groups: n responses to each prompt, c of them correct; NaN is returned when there are no groups.
        k: responses drawn, at most n of every group.
        threshold: a response with at least this reward is correct.
    """
    estimates = []
    for group in groups:
        num_samples = len(group.rollouts)
        assert 1 <= k <= num_samples, f"pass@{k} of {num_samples} responses to {group.prompt.prompt_id}"
        num_correct = sum(item.reward >= threshold for item in group.rollouts)
        estimates.append(1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k))
    return sum(estimates) / len(estimates) if estimates else math.nan
