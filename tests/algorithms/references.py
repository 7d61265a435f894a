"""Every method written a second time, with loops over Python floats (64 bit), from the papers' formulas.

Nothing here uses megarl's functions. A sequence is the list of its trained tokens' values.
"""

import math
from collections.abc import Sequence

Floats = Sequence[float]


def mean(values: Floats) -> float:
    return sum(values) / len(values)


def sample_std(values: Floats) -> float:
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def sequence_advantages(
    name: str, rewards: Floats, penalties: Floats, groups: Sequence[int], greedy: Floats, tasks: Sequence[int]
) -> list[float]:
    """One advantage for each response; ``greedy`` are the rewards of its prompt's greedy response."""
    advantages = []
    everyone = range(len(rewards))
    for i in everyone:
        group, task = [j for j in everyone if groups[j] == groups[i]], [j for j in everyone if tasks[j] == tasks[i]]
        others = [rewards[j] + penalties[j] for j in group if j != i]
        value = rewards[i] + penalties[i]
        match name:
            case "group_mean":
                advantage = value - mean([rewards[j] + penalties[j] for j in group])
            case "leave_one_out":
                advantage = value - mean(others) if others else 0.0
            case "greedy_baseline":
                advantage = value - greedy[i]
            case "group_mean_std" | "batch_mean_std" | "group_mean_batch_std" | "group_mean_task_std":
                centered = everyone if name == "batch_mean_std" else group
                scaled = {"group_mean_std": group, "group_mean_task_std": task}.get(name, everyone)
                advantage = (rewards[i] - mean([rewards[j] for j in centered])) / (sample_std([rewards[j] for j in scaled]) + 1e-6)
                advantage += penalties[i] - mean([penalties[j] for j in centered])
            case _:
                raise AssertionError(name)
        advantages.append(advantage)
    return advantages


def token_advantages(
    name: str,
    rewards: Floats,
    token_rewards: Sequence[Floats],
    groups: Sequence[int],
    greedy: Floats,
    values: Sequence[Floats],
    discount: float,
    decay: float,
    tasks: Sequence[int],
    steps: Sequence[Sequence[tuple[int, float]]],
    positions: Sequence[Sequence[int]],
) -> list[list[float]]:
    """One advantage for each trained token of each response.

    Args:
        token_rewards: the penalties, without the outcome's reward.
        greedy: for each response the reward of its prompt's greedy response.
        values, discount, decay: gae's.
        tasks: of each response.
        steps, positions: for each response the place and the reward of each step's end, and the places of the trained tokens.
    """
    if name == "process_rewards":
        return process_advantages(steps, positions, groups)
    if name == "gae":
        return [
            gae([*tokens[:-1], tokens[-1] + reward], own, discount, decay) if tokens else []
            for reward, tokens, own in zip(rewards, token_rewards, values, strict=True)
        ]
    returns = [reward + sum(tokens) for reward, tokens in zip(rewards, token_rewards, strict=True)]
    if name in ("reward_to_go", "reward_to_go_batch_mean"):
        baseline = mean(returns) if name == "reward_to_go_batch_mean" else 0.0
        return [
            [reward + sum(tokens[t:]) - baseline for t in range(len(tokens))]
            for reward, tokens in zip(rewards, token_rewards, strict=True)
        ]
    per_sequence = sequence_advantages(name, rewards, [sum(tokens) for tokens in token_rewards], groups, greedy, tasks)
    return [[advantage] * len(tokens) for advantage, tokens in zip(per_sequence, token_rewards, strict=True)]


def process_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], positions: Sequence[Sequence[int]], groups: Sequence[int]
) -> list[list[float]]:
    advantages = []
    for i in range(len(groups)):
        rewards = [reward for j in range(len(groups)) if groups[j] == groups[i] for _, reward in steps[j]]
        row = []
        for position in positions[i]:
            total = 0.0
            for end, reward in steps[i]:
                if end >= position:
                    total += (reward - mean(rewards)) / (sample_std(rewards) + 1e-6)
            row.append(total)
        advantages.append(row)
    return advantages


def whitened(advantages: list[list[float]]) -> list[list[float]]:
    everything = [advantage for sequence in advantages for advantage in sequence]
    center = mean(everything)
    variance = mean([(advantage - center) ** 2 for advantage in everything])
    return [[(advantage - center) / math.sqrt(variance + 1e-8) for advantage in sequence] for sequence in advantages]


def gae(rewards: Floats, values: Floats, discount: float, decay: float) -> list[float]:
    """One response, by the definition: a double sum."""
    num = len(rewards)
    deltas = [rewards[t] + discount * (values[t + 1] if t + 1 < num else 0.0) - values[t] for t in range(num)]
    return [sum((discount * decay) ** (u - t) * deltas[u] for u in range(t, num)) for t in range(num)]


def kl(logp: float, reference: float, estimator: str) -> float:
    r = math.exp(reference - logp)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[estimator]


def surrogate_terms(
    name: str, level: str, logps: Floats, frozen: Floats, olds: Floats, advantages: Floats, settings: dict[str, float]
) -> list[float]:
    """Loss of each trained token of one response, before aggregation.

    Args:
        logps: varied to get derivatives.
        frozen: the same numbers, for what the paper puts under a stop-gradient.
        settings: low, high, dual (0 for none), tau.
    """
    num = len(logps)
    low, high = settings["low"], settings["high"]
    if name == "gmpo":
        product = 1.0
        for logp, old, advantage in zip(logps, olds, advantages, strict=True):
            ratio = math.exp(logp - old)
            product *= min(ratio, math.exp(high)) if advantage > 0 else max(ratio, math.exp(-low))
        return [-advantage * product ** (1 / num) for advantage in advantages]
    if name == "mirror_descent":
        square = (sum(logps) - sum(olds)) ** 2
        terms = [-advantage * logp for logp, advantage in zip(logps, advantages, strict=True)]
        terms[0] += settings["tau"] / 2 * square  # of the whole response, so it may stand at any token of a sum
        return terms
    if name == "policy_gradient":
        return [-advantage * logp for logp, advantage in zip(logps, advantages, strict=True)]
    s = math.exp(mean([logp - old for logp, old in zip(logps, olds, strict=True)]))
    s_frozen = math.exp(mean([logp - old for logp, old in zip(frozen, olds, strict=True)]))
    terms = []
    for t in range(num):
        ratio = {
            "token": math.exp(logps[t] - olds[t]),
            "sequence": s,
            "sequence_token": s_frozen * math.exp(logps[t]) / math.exp(frozen[t]),
        }[level]
        frozen_ratio = math.exp(frozen[t] - olds[t]) if level == "token" else s_frozen
        if name == "cispo":
            terms.append(-min(max(frozen_ratio, 1 - low), 1 + high) * advantages[t] * logps[t])
            continue
        assert name == "ppo_clip"
        gain = min(ratio * advantages[t], min(max(ratio, 1 - low), 1 + high) * advantages[t])
        if settings["dual"] and advantages[t] < 0:
            gain = max(gain, settings["dual"] * advantages[t])
        terms.append(-gain)
    return terms


def aggregated(name: str, terms: Sequence[Floats], longest: int) -> float:
    if name == "sequence_mean":
        return mean([mean(sequence) if sequence else 0.0 for sequence in terms])
    if name == "token_mean":
        return mean([term for sequence in terms for term in sequence])
    if name == "sequence_sum":
        return mean([sum(sequence) for sequence in terms])
    assert name == "token_sum_over_constant"
    return mean([sum(sequence) / longest for sequence in terms])


def soft_overlong(length: int, longest: int, buffer: float) -> float:
    if length <= longest - buffer or buffer == 0:
        return 0.0
    if length <= longest:
        return (longest - buffer - length) / buffer
    return -1.0


def kimi_length_reward(index: int, lengths: Sequence[int], correct: Sequence[bool], groups: Sequence[int]) -> float:
    group = [lengths[j] for j in range(len(lengths)) if groups[j] == groups[index]]
    if max(group) == min(group):
        return 0.0
    value = 0.5 - (lengths[index] - min(group)) / (max(group) - min(group))
    return value if correct[index] else min(0.0, value)


def sampler_weight(trainer: Floats, sampler: Floats, method: str, level: str, cap: float) -> list[float]:
    """Weight of each trained token of one response."""
    ratios = [math.exp(a - b) for a, b in zip(trainer, sampler, strict=True)]
    if level == "sequence":
        ratios = [math.prod(ratios)] * len(ratios)
    return [min(ratio, cap) if method == "tis" else (ratio if ratio <= cap else 0.0) for ratio in ratios]
