"""Correction for responses sampled by slightly another policy than the trainer computes: the sampler correction axis.

The engine's log-probabilities differ from the trainer's for the same weights (other kernels, other precision, older weights). The
policy loss of each token is weighted by the ratio π_trainer / π_sampler, truncated (TIS) or masked (MIS) at a cap. A loss of a
whole response has one weight, the ratio of the response: weights that differ within it would make it another loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.sequences import spread_over_tokens, sums_per_sequence
from megarl.config.checks.algorithm import WHOLE_RESPONSE_SURROGATES
from megarl.config.schema import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One choice of the axis: the weight of a ratio, given the cap."""

    function: Callable[[Tensor, float], Tensor]
    formula: str


def truncated(ratio: Tensor, cap: float) -> Tensor:
    """min(ratio, cap): truncated importance sampling (Ionides 2008; Yao et al. 2025, off-policy RL from inference mismatch)."""
    return ratio.clamp(max=cap)


def masked(ratio: Tensor, cap: float) -> Tensor:
    """The ratio up to the cap and 0 above it: masked importance sampling (Liu et al. 2025, training-inference mismatch)."""
    return torch.where(ratio > cap, 0.0, ratio)


CORRECTIONS = {
    "tis": Correction(function=truncated, formula="min(π_trainer / π_sampler, cap) (Yao et al. 2025)"),
    "mis": Correction(function=masked, formula="π_trainer / π_sampler, 0 above cap (Liu et al. 2025)"),
}


def correction_level(config: AlgorithmConfig) -> str:
    """``token`` or ``sequence``: as configured, else whole responses where the loss or its ratio is of whole responses.

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
    """Weight of each token's policy loss.

    Args:
        trainer, sampler: float [num_tokens], log-probabilities of the tokens.
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
