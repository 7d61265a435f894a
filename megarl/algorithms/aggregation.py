"""How token losses become one number: the aggregation axis, with the global normaliser written into token weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.sequences import sequence_numbers, sums_per_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """One choice of the axis; ``function(loss_mask, cu_seqlens, max_new_tokens)`` gives float64 [num_tokens] before the mask."""

    function: Callable[[Tensor, Tensor, int], Tensor]
    formula: str


def sequence_mean(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """Return 1 / (N · tokens of the sequence): GRPO's mean of sequence means (arXiv 2402.03300, equation 3).

    A sequence without trained tokens counts as one of mean 0.
    """
    trained = sums_per_sequence(loss_mask, cu_seqlens)[sequence_numbers(cu_seqlens)]
    return 1 / (trained.clamp(min=1) * (cu_seqlens.numel() - 1))


def token_mean(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """Return 1 / tokens of the batch (DAPO, arXiv 2503.14476, equation 8)."""
    return 1 / loss_mask.double().sum().clamp(min=1).expand(loss_mask.numel())


def token_sum_over_constant(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """Return 1 / (N · longest response allowed): no normalisation by length (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    return _constant(loss_mask, 1 / ((cu_seqlens.numel() - 1) * max_new_tokens))


def sequence_sum(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """Return 1 / N: the mean of sequence sums, log π of whole responses (RLOO, arXiv 2402.14740; Kimi k1.5, 2501.12599)."""
    return _constant(loss_mask, 1 / (cu_seqlens.numel() - 1))


def _constant(loss_mask: Tensor, value: float) -> Tensor:
    return torch.full((loss_mask.numel(),), value, dtype=torch.float64, device=loss_mask.device)


AGGREGATIONS = {
    "sequence_mean": Aggregation(function=sequence_mean, formula="1/N Σ_i 1/|o_i| Σ_t (2402.03300)"),
    "token_mean": Aggregation(function=token_mean, formula="1/Σ_i|o_i| Σ_i Σ_t (2503.14476)"),
    "token_sum_over_constant": Aggregation(function=token_sum_over_constant, formula="1/(N · max_new_tokens) Σ_i Σ_t (2503.20783)"),
    "sequence_sum": Aggregation(function=sequence_sum, formula="1/N Σ_i Σ_t (2402.14740)"),
}


def token_weights(loss_mask: Tensor, cu_seqlens: Tensor, aggregation: str, max_new_tokens: int) -> Tensor:
    """Return the weight of each token such that the loss is the plain sum of weight times term over the whole batch.

    Args:
        loss_mask: bool [num_tokens].
        cu_seqlens: int64 [num_sequences + 1].
        aggregation: a key of AGGREGATIONS.
        max_new_tokens: longest response allowed.

    Returns:
        float32 [num_tokens], 0 where the mask is False.
    """
    return (AGGREGATIONS[aggregation].function(loss_mask, cu_seqlens, max_new_tokens) * loss_mask).float()
