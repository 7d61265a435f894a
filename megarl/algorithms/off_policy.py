"""Correct for responses sampled by another policy than the trainer computes, and count how old they are.

The engine's log-probs differ from the trainer's for the same weights (other kernels, other precision, older weights). The
policy loss of each token is weighted by the ratio π_trainer / π_sampler, truncated (TIS) or masked (MIS) at a cap. A loss of a
whole response has one weight, the ratio of the response: weights that differ within it would make it another loss. This is the
sampler correction axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.sequences import spread_over_tokens, sums_per_sequence
from megarl.config.checks.algorithm import WHOLE_RESPONSE_SURROGATES
from megarl.config.schema import AlgorithmConfig
from megarl.types import PackedBatch, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One choice of the axis: the weight of a ratio, given the cap."""

    function: Callable[[Tensor, float], Tensor]
    formula: str


def truncated(ratio: Tensor, cap: float) -> Tensor:
    """Return min(ratio, cap): truncated importance sampling (Ionides 2008; Yao et al. 2025)."""
    return ratio.clamp(max=cap)


def masked(ratio: Tensor, cap: float) -> Tensor:
    """Return the ratio up to the cap and 0 above it: masked importance sampling (Liu et al. 2025)."""
    return torch.where(ratio > cap, 0.0, ratio)


CORRECTIONS = {
    "tis": Correction(function=truncated, formula="min(π_trainer / π_sampler, cap) (Yao et al. 2025)"),
    "mis": Correction(function=masked, formula="π_trainer / π_sampler, 0 above cap (Liu et al. 2025)"),
}


def correction_level(config: AlgorithmConfig) -> str:
    """Return ``token`` or ``sequence``: as configured, else whole responses where the loss or its ratio is of whole responses.

    The importance weight of a term is the ratio of the probabilities of all that the term depends on (Liu et al. 2025; GSPO, arXiv
    2507.18071, section 4.1): for -A log π(o) + τ/2 (log π(o) - log π_old(o))², a geometric mean or a sequence's ratio that is the
    response.
    """
    given = config.sampler_correction.level
    if given is not None:
        return given
    is_whole = config.surrogate in WHOLE_RESPONSE_SURROGATES or config.ratio in ("sequence", "sequence_token")
    return "sequence" if is_whole else "token"


def sampler_weights(
    trainer: Tensor, sampler: Tensor, cu_seqlens: Tensor, loss_mask: Tensor, *, method: str, level: str, cap: float
) -> Tensor:
    """Return the weight of each token's policy loss.

    Args:
        trainer, sampler: float [num_tokens], log-probs of the tokens.
        cu_seqlens: int64 [num_sequences + 1].
        loss_mask: bool [num_tokens].
        method: a key of CORRECTIONS.
        level: ``token``, or ``sequence`` for the ratio of whole responses (the product of its tokens').
        cap: largest ratio.

    Returns:
        float32 [num_tokens], 0 where the mask is False.
    """
    log_ratio = (trainer - sampler) * loss_mask
    correct = CORRECTIONS[method].function
    if level == "token":
        return (correct(log_ratio.exp(), cap) * loss_mask).float()
    assert level == "sequence", level
    weights = correct(sums_per_sequence(log_ratio, cu_seqlens).exp(), cap)
    return spread_over_tokens(weights.float(), cu_seqlens, loss_mask)


def token_staleness(packed: PackedBatch, version: int) -> Tensor:
    """Count the updates between the weights that sampled each token and ``version``, int64 [num_tokens]; 0 if not trained."""
    return torch.where(packed.loss_mask, version - packed.weight_versions, 0)


def staleness_metrics(batches: Sequence[TrainBatch], version: int) -> dict[str, float]:
    """Return the histogram of the staleness of trained tokens, and the gap between sampler and trainer for each staleness.

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
    """Return of the trained tokens the float64 gap before and behind the correction, and bool whether their weight is above 0."""
    assert batch.sampled is not None
    sampled = batch.sampled
    mask = batch.packed.loss_mask
    log_ratio = (sampled.old_logprobs.double() - batch.packed.sampler_logprobs.double())[mask]
    weights = torch.ones_like(log_ratio) if sampled.sampler_weights is None else sampled.sampler_weights[mask].double()
    is_used = weights > 0
    return log_ratio.abs(), torch.where(is_used, log_ratio - weights.clamp(min=1e-300).log(), 0.0).abs(), is_used
