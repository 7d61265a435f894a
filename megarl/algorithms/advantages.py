"""From rewards to advantages: the baseline axis.

A function of this axis takes an AdvantageInput and returns float [num_tokens], one advantage for each trained token. All of
them see the whole step's batch, so every mean and standard deviation is over all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.gae import generalised_advantages
from megarl.algorithms.sequences import spread_over_tokens, suffix_sums, sums_per_sequence

EPSILON = 1e-6  # keeps rewards that are all equal at advantage 0
WHITENING_EPSILON = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInput:
    """What is known of the step's responses when advantages are made.

    Attributes:
        rewards: float32 [num_sequences], shaped.
        greedy_rewards: float32 [num_sequences], of the greedy response to the sequence's prompt, shaped like ``rewards``; NaN
            unless the Advantage needs greedy responses.
        token_rewards: float32 [num_tokens], added to the reward at that token (the KL penalty in the reward); 0 elsewhere.
        step_rewards: float32 [num_tokens], reward of the reasoning step that ends with the token; NaN where none ends.
        group_ids: int64 [num_sequences], sequences with equal id answer the same prompt.
        task_ids: int64 [num_sequences], sequences with equal id have prompts of the same task.
        cu_seqlens: int64 [num_sequences + 1].
        loss_mask: bool [num_tokens].
        values: float32 [num_tokens], what the critic expects before each token; None without a critic.
        discount: γ of GAE.
        trace_decay: λ of GAE, one for all or float [num_sequences].
    """

    rewards: Tensor
    greedy_rewards: Tensor
    token_rewards: Tensor
    step_rewards: Tensor
    group_ids: Tensor
    task_ids: Tensor
    cu_seqlens: Tensor
    loss_mask: Tensor
    values: Tensor | None
    discount: float
    trace_decay: float | Tensor

    def returns(self) -> Tensor:
        """Return the reward and token rewards of each sequence together; float64 [num_sequences]."""
        return self.rewards.double() + sums_per_sequence(self.token_rewards * self.loss_mask, self.cu_seqlens)

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """Give each sequence's advantage to its trained tokens: float64 [num_sequences] to [num_tokens] as rewards are."""
        return spread_over_tokens(per_sequence.to(self.rewards.dtype), self.cu_seqlens, self.loss_mask)


AdvantageFunction = Callable[[AdvantageInput], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """One choice of the axis.

    Attributes:
        function: the advantages.
        formula: what it computes, with the paper.
        needs_greedy_response: whether each prompt is also answered at temperature 0, for ``AdvantageInput.greedy_rewards``.
    """

    function: AdvantageFunction
    formula: str
    needs_greedy_response: bool = False

    def __call__(self, inputs: AdvantageInput) -> Tensor:
        """Return the advantages, so that a config can name an Advantage where it can name a function."""
        return self.function(inputs)


def mean_std_count(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, sample standard deviation (n - 1) and size of each member's group; a group of one has standard deviation 0.

    Args:
        values: float64 [n].
        ids: int64 [n], equal for members of one group.

    Returns:
        Three float64 [n].
    """
    _, members, counts = ids.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    means = torch.zeros_like(counts).index_add_(0, members, values) / counts
    squares = torch.zeros_like(counts).index_add_(0, members, (values - means[members]).square())
    deviations = (squares / (counts - 1).clamp(min=1)).sqrt()
    return means[members], deviations[members], counts[members]


def group_mean(inputs: AdvantageInput) -> Tensor:
    """Return R - mean of the group (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    returns = inputs.returns()
    mean, _, _ = mean_std_count(returns, inputs.group_ids)
    return inputs.per_token(returns - mean)


def group_mean_std(inputs: AdvantageInput) -> Tensor:
    """Return (R - mean of the group) / (standard deviation of the group + 1e-6) (GRPO, arXiv 2402.03300, section 4.1.2)."""
    return _normalised(inputs, inputs.group_ids, inputs.group_ids)


def _normalised(inputs: AdvantageInput, centered_over: Tensor, scaled_over: Tensor) -> Tensor:
    """Return (r - mean) / (standard deviation of r + 1e-6) of the rewards r, plus K - mean of the sums K of token rewards, not
    scaled.

    A penalty in the reward keeps its coefficient, as one in the loss does beside normalised rewards. Scaled with them it would
    be all there is in a group of equal ones, and a KL of 1e-5 as much as a right answer elsewhere.

    Args:
        centered_over, scaled_over: int64 [num_sequences], equal for members of the set whose mean, or deviation, counts.
    """
    rewards, penalties = inputs.rewards.double(), inputs.returns() - inputs.rewards.double()
    mean, _, _ = mean_std_count(rewards, centered_over)
    _, std, _ = mean_std_count(rewards, scaled_over)
    mean_penalty, _, _ = mean_std_count(penalties, centered_over)
    return inputs.per_token((rewards - mean) / (std + EPSILON) + penalties - mean_penalty)


def leave_one_out(inputs: AdvantageInput) -> Tensor:
    """Return R - mean of the group's others (RLOO, arXiv 2402.14740, equation 8); 0 where there are no others."""
    returns = inputs.returns()
    mean, _, count = mean_std_count(returns, inputs.group_ids)
    return inputs.per_token((returns - mean) * count / (count - 1).clamp(min=1))


def batch_mean_std(inputs: AdvantageInput) -> Tensor:
    """Return (R - mean of the batch) / (standard deviation of the batch + 1e-6), over responses."""
    everything = torch.zeros_like(inputs.group_ids)
    return _normalised(inputs, everything, everything)


def group_mean_batch_std(inputs: AdvantageInput) -> Tensor:
    """Return (R - mean of the group) / (std of all R of the batch + 1e-6) (Lite PPO, arXiv 2508.08221, section 4)."""
    return _normalised(inputs, inputs.group_ids, torch.zeros_like(inputs.group_ids))


def group_mean_task_std(inputs: AdvantageInput) -> Tensor:
    """Return (R - mean of the group) / (std of the task's R in the batch + 1e-6) (QwenLong-L1.5, arXiv 2512.12967)."""
    return _normalised(inputs, inputs.group_ids, inputs.task_ids)


def process_rewards(inputs: AdvantageInput) -> Tensor:
    """Return process supervision's advantages: the group's normalised step rewards, each added to the tokens up to its step's end.

    GRPO, arXiv 2402.03300, section 4.1.3: r̃_j = (r_j - mean) / std over all steps of all responses of the group, and the advantage
    of token t is the sum of r̃_j over the steps of its response that end at t or later. Rewards of whole responses are not used.
    """
    ends = (~inputs.step_rewards.isnan()).nonzero()[:, 0]
    rewards = inputs.step_rewards[ends].double()
    groups = inputs.group_ids.repeat_interleave(inputs.cu_seqlens.diff())[ends]
    mean, std, _ = mean_std_count(rewards, groups)
    at_ends = torch.zeros(inputs.loss_mask.numel(), dtype=torch.float64, device=rewards.device)
    at_ends[ends] = (rewards - mean) / (std + EPSILON)
    return (suffix_sums(at_ends, inputs.cu_seqlens) * inputs.loss_mask).to(inputs.rewards.dtype)


def greedy_baseline(inputs: AdvantageInput) -> Tensor:
    """Return R - reward of the greedy response to the same prompt (ReMax, arXiv 2310.10505, equation 5).

    The KL penalty in the reward is part of R only, as in the authors' code: whatever does not depend on the sampled response is an
    unbiased baseline.
    """
    return inputs.per_token(inputs.returns() - inputs.greedy_rewards.double())


def reward_to_go(inputs: AdvantageInput) -> Tensor:
    """Return R plus token rewards from the token on, no baseline (Williams 1992; REINFORCE++, arXiv 2501.03262, equation 8)."""
    onward = suffix_sums(inputs.token_rewards * inputs.loss_mask, inputs.cu_seqlens)
    outcome = inputs.rewards.double().repeat_interleave(inputs.cu_seqlens.diff())
    return ((outcome + onward) * inputs.loss_mask).to(inputs.rewards.dtype)


def reward_to_go_batch_mean(inputs: AdvantageInput) -> Tensor:
    """Return reward-to-go minus the mean return of the batch's responses (Williams 1992, reinforcement baseline)."""
    return reward_to_go(inputs) - inputs.returns().mean().to(inputs.rewards.dtype) * inputs.loss_mask


def gae(inputs: AdvantageInput) -> Tensor:
    """Return generalised advantages (arXiv 1506.02438), the reward at the last trained token (arXiv 1909.08593)."""
    assert inputs.values is not None
    rewards = inputs.token_rewards * inputs.loss_mask + outcome_at_last_token(inputs.rewards, inputs.cu_seqlens, inputs.loss_mask)
    return generalised_advantages(
        rewards, inputs.values, inputs.cu_seqlens, inputs.loss_mask, discount=inputs.discount, trace_decay=inputs.trace_decay
    )


def outcome_at_last_token(rewards: Tensor, cu_seqlens: Tensor, loss_mask: Tensor) -> Tensor:
    """Put each sequence's reward at its last trained token, 0 elsewhere: float [num_sequences] to [num_tokens]."""
    left = suffix_sums(loss_mask, cu_seqlens)  # trained tokens from here on
    is_last = loss_mask & (left == 1)
    return rewards.repeat_interleave(cu_seqlens.diff()) * is_last


ADVANTAGES = {
    "group_mean_std": Advantage(function=group_mean_std, formula="(R − mean_group R) / (std_group R + ε) (2402.03300)"),
    "group_mean": Advantage(function=group_mean, formula="R − mean_group R (2503.20783)"),
    "leave_one_out": Advantage(function=leave_one_out, formula="R − mean of the group's other R (2402.14740)"),
    "group_mean_batch_std": Advantage(function=group_mean_batch_std, formula="(R − mean_group R) / (std_batch R + ε) (2508.08221)"),
    "group_mean_task_std": Advantage(function=group_mean_task_std, formula="(R − mean_group R) / (std_task R + ε) (2512.12967)"),
    "process_rewards": Advantage(
        function=process_rewards,
        formula="Σ over steps that end at t or later of (r − mean_group r) / (std_group r + ε) (2402.03300)",
    ),
    "batch_mean_std": Advantage(function=batch_mean_std, formula="(R − mean_batch R) / (std_batch R + ε)"),
    "greedy_baseline": Advantage(
        function=greedy_baseline, formula="R − R of the prompt's greedy response (2310.10505)", needs_greedy_response=True
    ),
    "reward_to_go": Advantage(function=reward_to_go, formula="R + Σ_{u≥t} token rewards (Williams 1992)"),
    "reward_to_go_batch_mean": Advantage(
        function=reward_to_go_batch_mean, formula="R + Σ_{u≥t} token rewards − mean_batch R (Williams 1992)"
    ),
    "gae": Advantage(function=gae, formula="Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t (1506.02438)"),
}


def whiten(advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """Whiten to mean 0 and variance 1 over all trained tokens of the batch (arXiv 1909.08593's code; REINFORCE++, 2501.03262,
    equation 10).

    Args:
        advantages: float [num_tokens].
        loss_mask: bool [num_tokens].

    Returns:
        float [num_tokens], 0 where the mask is False.
    """
    values = advantages[loss_mask].double()
    if values.numel() == 0:
        return advantages
    whitened = (advantages - values.mean()) * (values.var(correction=0) + WHITENING_EPSILON).rsqrt()
    return (whitened * loss_mask).to(advantages.dtype)
