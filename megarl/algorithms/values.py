"""What a critic minimises and how well it predicts."""

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Return ½ max((V - R)², (clip(V, V_old ± ε) - R)²) for each token (arXiv 1909.08593's code; PPO, 1707.06347).

    Args:
        values: float [tokens], differentiable.
        old_values: float [tokens], of the critic before its updates.
        returns: float [tokens].
        clip_range: ε.
    """
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Return 1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant; 0 where all returns are equal.

    Args:
        values, returns: float [tokens].

    Returns:
        scalar.
    """
    variance = returns.var(correction=0)
    if variance == 0:
        return torch.zeros_like(variance)
    return 1 - (returns - values).var(correction=0) / variance
