"""From rewards to advantages: the baseline axis."""

import torch
from torch import Tensor

EPSILON = 1e-6  # keeps a group of equal rewards at advantage 0


def group_advantages(rewards: Tensor, group_ids: Tensor, *, divide_by_std: bool) -> Tensor:
    """Reward minus its group's mean, optionally divided by the group's standard deviation (GRPO, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample one (n - 1), as in the published implementations; a group of one gives 0.

    Args:
        rewards: float [num_sequences].
        group_ids: int64 [num_sequences].

    Returns:
        float32 [num_sequences].
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float32)
    for group in group_ids.unique():
        members = group_ids == group
        values = rewards[members].double()
        centred = values - values.mean()
        if divide_by_std and values.numel() > 1:
            centred = centred / (values.std() + EPSILON)
        advantages[members] = centred.float()
    return advantages


def spread_over_tokens(per_sequence: Tensor, cu_seqlens: Tensor, loss_mask: Tensor) -> Tensor:
    """Give every trained token its sequence's value, and 0 to the others.

    Args:
        per_sequence: float [num_sequences].
        cu_seqlens: int64 [num_sequences + 1].
        loss_mask: bool [num_tokens].

    Returns:
        float [num_tokens].
    """
    return per_sequence.repeat_interleave(cu_seqlens.diff()) * loss_mask
