"""How old the weights were that sampled what is trained on, and what that does to the log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.types import PackedBatch, TrainBatch


def token_staleness(packed: PackedBatch, version: int) -> Tensor:
    """int64 [num_tokens]: updates between the weights that sampled each token and ``version``; 0 where nothing is trained."""
    return torch.where(packed.loss_mask, version - packed.weight_versions, 0)


def staleness_metrics(batches: Sequence[TrainBatch], version: int) -> dict[str, float]:
    """Histogram of the staleness of trained tokens, and the gap between sampler and trainer for each staleness.

    The gap of a token is |log π_trainer - log π_sampler| (nats): the trainer's at ``version``, the sampler's at the weights that
    sampled it. Behind the sampler correction it is |log π_trainer - log π_sampler - log w|, the part of the ratio that the token's
    weight w does not make up for; tokens of weight 0 are left out of the loss, and of this mean.

    Args:
        batches: of one step.
        version: of the weights at the start of the step's updates.

    Returns:
        ``staleness_mean``, ``staleness_max``, and for each staleness k that occurs ``staleness/k_tokens``, ``staleness/k_gap`` and
        ``staleness/k_gap_corrected``; nothing when no token is trained.
    """
    staleness = torch.cat([token_staleness(batch.packed, version)[batch.packed.loss_mask] for batch in batches])
    if staleness.numel() == 0:
        return {}
    gap, remaining, is_used = (torch.cat(parts) for parts in zip(*map(_gaps, batches), strict=True))
    metrics = {"staleness_mean": float(staleness.double().mean()), "staleness_max": float(staleness.max())}
    for k in staleness.unique().tolist():
        here = staleness == k
        metrics[f"staleness/{k}_tokens"] = float(here.sum())
        metrics[f"staleness/{k}_gap"] = float(gap[here].mean())
        if (here & is_used).any():
            metrics[f"staleness/{k}_gap_corrected"] = float(remaining[here & is_used].mean())
    return metrics


def _gaps(batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the trained tokens: float64 gap before and behind the correction, and bool whether their weight is above 0."""
    assert batch.old_logprobs is not None
    mask = batch.packed.loss_mask
    log_ratio = (batch.old_logprobs.double() - batch.packed.sampler_logprobs.double())[mask]
    weights = torch.ones_like(log_ratio) if batch.sampler_weights is None else batch.sampler_weights[mask].double()
    is_used = weights > 0
    return log_ratio.abs(), torch.where(is_used, log_ratio - weights.clamp(min=1e-300).log(), 0.0).abs(), is_used
