"""Shape rewards by the length of responses, and advantages by the entropy of the batch."""

import torch
from torch import Tensor


def soft_overlong_penalties(lengths: Tensor, max_tokens: int, buffer_tokens: float) -> Tensor:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    0 up to L_max - L_cache, then linear down to -1 at L_max, and -1 beyond.

    Args:
        lengths: int64 [num_sequences], response tokens.
        max_tokens: L_max.
        buffer_tokens: L_cache, above 0.

    Returns:
        float32 [num_sequences].
    """
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1, 0).float()


def length_rewards(lengths: Tensor, is_correct: Tensor, group_ids: Tensor) -> Tensor:
    """Return Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3).

    λ = 0.5 - (length - min) / (max - min) over the group: a correct response gets λ, a wrong one min(0, λ); all get 0 where the
    group's lengths are equal.

    Args:
        lengths: int64 [num_sequences], response tokens.
        is_correct: bool [num_sequences].
        group_ids: int64 [num_sequences].

    Returns:
        float32 [num_sequences].
    """
    _, members = group_ids.unique(return_inverse=True)
    num_groups = int(members.max()) + 1
    lengths = lengths.double()
    shortest = torch.full((num_groups,), torch.inf, dtype=torch.float64, device=lengths.device)
    shortest = shortest.scatter_reduce(0, members, lengths, "amin")[members]
    longest = torch.zeros(num_groups, dtype=torch.float64, device=lengths.device)
    longest = longest.scatter_reduce(0, members, lengths, "amax")[members]
    spread = longest - shortest
    rewards = 0.5 - (lengths - shortest) / spread.clamp(min=1)
    rewards = torch.where(is_correct, rewards, rewards.clamp(max=0))
    return torch.where(spread == 0, 0.0, rewards).float()


def masks_negative(entropy: float, was_masking: bool, low: float, high: float) -> bool:
    """Return whether negative samples are left out of this step.

    They are left out once the batch's entropy is above ``high`` (their gradient raises it further) and taken back in once it is
    below ``low``; in between nothing changes.

    Args:
        entropy: mean token entropy of the batch, nats.
        was_masking: the last step's answer.
        low, high: thresholds, nats.
    """
    if entropy > high:
        return True
    return was_masking and entropy >= low


def without_negatives(advantages: Tensor) -> Tensor:
    """Set negative advantages to 0; the normaliser of the loss stays that of all samples."""
    return advantages.clamp(min=0)
