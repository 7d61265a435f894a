"""Cut a step's sequences into the batches of optimizer steps, and weigh their tokens: the aggregation axis.

An aggregation says how token losses become one number. Its global normaliser is written into the token weights of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megarl.algorithms.sequences import sequence_numbers, spread_over_tokens, sums_per_sequence, trained_lengths
from megarl.types import PackedBatch, TokenOutputs, TrainBatch

PER_SEQUENCE = ("group_ids", "task_ids", "rewards", "truncated", "greedy_rewards", "greedy_lengths", "correct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """One choice of the axis; ``function(loss_mask, cu_seqlens, max_new_tokens)`` gives float64 [num_tokens] before the mask."""

    function: Callable[[Tensor, Tensor, int], Tensor]
    formula: str


def sequence_mean(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """1 / (N · tokens of the sequence): GRPO's mean of sequence means (arXiv 2402.03300, equation 3).

    A sequence without trained tokens counts as one of mean 0.
    """
    trained = sums_per_sequence(loss_mask, cu_seqlens)[sequence_numbers(cu_seqlens)]
    return 1 / (trained.clamp(min=1) * (cu_seqlens.numel() - 1))


def token_mean(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """1 / tokens of the batch (DAPO, arXiv 2503.14476, equation 8)."""
    return 1 / loss_mask.double().sum().clamp(min=1).expand(loss_mask.numel())


def token_sum_over_constant(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """1 / (N · longest response allowed): no normalisation by length (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    return _constant(loss_mask, 1 / ((cu_seqlens.numel() - 1) * max_new_tokens))


def sequence_sum(loss_mask: Tensor, cu_seqlens: Tensor, max_new_tokens: int) -> Tensor:
    """1 / N: the mean of sequence sums, log π of whole responses (RLOO, arXiv 2402.14740; Kimi k1.5, 2501.12599)."""
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
    """Weight of each token such that the loss is the plain sum of weight times term over the whole batch.

    Args:
        loss_mask: bool [num_tokens].
        cu_seqlens: int64 [num_sequences + 1].
        aggregation: a key of AGGREGATIONS.
        max_new_tokens: longest response allowed.

    Returns:
        float32 [num_tokens], 0 where the mask is False.
    """
    return (AGGREGATIONS[aggregation].function(loss_mask, cu_seqlens, max_new_tokens) * loss_mask).float()


def build_supervised_batch(packed: PackedBatch) -> TrainBatch:
    """Token-mean cross-entropy over the batch."""
    weights = token_weights(packed.loss_mask, packed.cu_seqlens, "token_mean", max_new_tokens=0)
    return _batch_of_responses(packed, None, weights, keeps_groups=False)


def build_preference_batch(packed: PackedBatch, reference_logprobs: Tensor | None) -> TrainBatch:
    """The mean over pairs of their losses: the weights of a pair's tokens, of both responses, add up to 1 / number of pairs.

    Args:
        packed: of ``data.packing.pack_pairs``, a preferred response and the other one to the same prompt after each other.
        reference_logprobs: float32 [num_tokens]; None for losses without a reference model.
    """
    trained = trained_lengths(packed.loss_mask, packed.cu_seqlens)
    of_pairs = trained.view(-1, 2).sum(1)
    per_token = (1.0 / (of_pairs.double() * of_pairs.numel())).repeat_interleave(2)
    weights = spread_over_tokens(per_token.float(), packed.cu_seqlens, packed.loss_mask)
    return _batch_of_responses(packed, reference_logprobs, weights, keeps_groups=True)


def _batch_of_responses(
    packed: PackedBatch, reference_logprobs: Tensor | None, weights: Tensor, *, keeps_groups: bool
) -> TrainBatch:
    """Responses that were given, not sampled."""
    return TrainBatch(
        packed=packed,
        old_logprobs=None,
        reference_logprobs=reference_logprobs,
        old_values=None,
        advantages=None,
        token_weights=weights,
        sampler_weights=None,
        returns=None,
        keeps_groups=keeps_groups,
    )


def split_into_updates(
    packed: PackedBatch,
    outputs: TokenOutputs,
    advantages: Tensor,
    sampler_weights: Tensor | None,
    returns: Tensor | None,
    *,
    num_updates: int,
    aggregation: str,
    max_new_tokens: int,
) -> list[TrainBatch]:
    """``num_updates`` batches of equally many consecutive sequences, each with its own normaliser.

    Args:
        advantages, sampler_weights, returns: float32 [num_tokens] of the whole step.
        aggregation: a key of AGGREGATIONS.
        max_new_tokens: longest response allowed.
    """
    size = packed.num_sequences // num_updates
    batches = []
    for first in range(0, size * num_updates, size):
        part = slice_sequences(packed, first, first + size)
        tokens = slice(int(packed.cu_seqlens[first]), int(packed.cu_seqlens[first + size]))
        batches.append(
            TrainBatch(
                packed=part,
                old_logprobs=outputs.old[tokens],
                reference_logprobs=None if outputs.reference is None else outputs.reference[tokens],
                old_values=None if outputs.values is None else outputs.values[tokens],
                advantages=advantages[tokens],
                token_weights=token_weights(part.loss_mask, part.cu_seqlens, aggregation, max_new_tokens),
                sampler_weights=None if sampler_weights is None else sampler_weights[tokens],
                returns=None if returns is None else returns[tokens],
                keeps_groups=False,
            )
        )
    return batches


def slice_sequences(packed: PackedBatch, first: int, last: int) -> PackedBatch:
    """Sequences ``first:last`` as a batch of their own."""
    tokens = slice(int(packed.cu_seqlens[first]), int(packed.cu_seqlens[last]))
    parts = {
        field.name: values[first:last] if field.name in PER_SEQUENCE else values[tokens]
        for field in fields(packed)
        if field.name != "cu_seqlens" and (values := getattr(packed, field.name)) is not None
    }
    return replace(packed, **parts, cu_seqlens=packed.cu_seqlens[first : last + 1] - packed.cu_seqlens[first])
