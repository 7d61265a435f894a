"""The clipped surrogate of PPO (arXiv 1707.06347, equation 7) with separate clip ranges (DAPO, arXiv 2503.14476)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Per-token terms, each [tokens].

    Attributes:
        loss: -min(ρ A, clip(ρ) A).
        ratio: ρ = exp(log π - log π_old).
        clipped_low: True where the lower bound is active and stops the gradient.
        clipped_high: likewise the upper bound.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """PPO's clipped surrogate for each token.

    Args:
        logprobs: float [tokens], differentiable.
        old_logprobs: float [tokens], of the policy that the batch is trained against.
        advantages: float [tokens].
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return PolicyLoss(
        loss=loss,
        ratio=ratio,
        clipped_low=(ratio < 1 - clip_low) & (advantages < 0),
        clipped_high=(ratio > 1 + clip_high) & (advantages > 0),
    )
