"""Cut a step's sequences into the batches of optimizer steps."""

from dataclasses import fields, replace

from torch import Tensor

from megarl.algorithms.aggregation import token_weights
from megarl.algorithms.sequences import spread_over_tokens, trained_lengths
from megarl.types import PackedBatch, SampledTokens, TrainBatch


def build_supervised_batch(packed: PackedBatch) -> TrainBatch:
    """Weigh the tokens of a batch for their mean cross-entropy."""
    weights = token_weights(packed.loss_mask, packed.cu_seqlens, "token_mean", max_new_tokens=0)
    return _batch_of_responses(packed, None, weights, keeps_groups=False)


def build_preference_batch(packed: PackedBatch, reference_logprobs: Tensor | None) -> TrainBatch:
    """Weigh the tokens of pairs so that the loss is the mean over pairs: both responses' weights add up to 1 / number of pairs.

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
    """Make a batch of responses that were given, not sampled."""
    return TrainBatch(
        packed=packed, token_weights=weights, reference_logprobs=reference_logprobs, sampled=None, keeps_groups=keeps_groups
    )


def split_into_updates(
    packed: PackedBatch,
    reference_logprobs: Tensor | None,
    sampled: SampledTokens,
    *,
    num_updates: int,
    aggregation: str,
    max_new_tokens: int,
) -> list[TrainBatch]:
    """Cut a step into ``num_updates`` batches of equally many consecutive sequences, each with its own normaliser.

    Args:
        packed: of the whole step.
        reference_logprobs: float32 [num_tokens] of the whole step; None without a reference model.
        sampled: of the whole step.
        num_updates: optimizer steps.
        aggregation: a key of aggregation.AGGREGATIONS.
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
                token_weights=token_weights(part.loss_mask, part.cu_seqlens, aggregation, max_new_tokens),
                reference_logprobs=None if reference_logprobs is None else reference_logprobs[tokens],
                sampled=sampled.at(tokens),
                keeps_groups=False,
            )
        )
    return batches


PER_SEQUENCE = ("group_ids", "task_ids", "rewards", "truncated", "greedy_rewards", "greedy_lengths", "correct")


def slice_sequences(packed: PackedBatch, first: int, last: int) -> PackedBatch:
    """Return the sequences ``first:last`` as a batch of their own."""
    tokens = slice(int(packed.cu_seqlens[first]), int(packed.cu_seqlens[last]))
    parts = {
        field.name: values[first:last] if field.name in PER_SEQUENCE else values[tokens]
        for field in fields(packed)
        if field.name != "cu_seqlens" and (values := getattr(packed, field.name)) is not None
    }
    return replace(packed, **parts, cu_seqlens=packed.cu_seqlens[first : last + 1] - packed.cu_seqlens[first])
