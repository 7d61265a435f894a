"""Cutting a step's sequences into the batches of optimizer steps."""

from dataclasses import fields, replace

from torch import Tensor

from megarl.algorithms.aggregation import token_weights
from megarl.types import PackedBatch, TokenScores, TrainBatch


def build_supervised_batch(packed: PackedBatch) -> TrainBatch:
    """Token-mean cross-entropy over the batch."""
    weights = token_weights(packed.loss_mask, packed.cu_seqlens, "token_mean", max_new_tokens=0)
    return TrainBatch(packed=packed, scores=None, advantages=None, token_weights=weights, sampler_weights=None, returns=None)


def split_into_updates(
    packed: PackedBatch,
    scores: TokenScores,
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
                scores=TokenScores(
                    old=scores.old[tokens],
                    entropies=scores.entropies[tokens],
                    reference=None if scores.reference is None else scores.reference[tokens],
                    values=None if scores.values is None else scores.values[tokens],
                ),
                advantages=advantages[tokens],
                token_weights=token_weights(part.loss_mask, part.cu_seqlens, aggregation, max_new_tokens),
                sampler_weights=None if sampler_weights is None else sampler_weights[tokens],
                returns=None if returns is None else returns[tokens],
            )
        )
    return batches


PER_SEQUENCE = ("group_ids", "task_ids", "rewards", "truncated", "greedy_rewards", "greedy_lengths")


def slice_sequences(packed: PackedBatch, first: int, last: int) -> PackedBatch:
    """Sequences ``first:last`` as a batch of their own."""
    tokens = slice(int(packed.cu_seqlens[first]), int(packed.cu_seqlens[last]))
    parts = {
        field.name: getattr(packed, field.name)[first:last] if field.name in PER_SEQUENCE else getattr(packed, field.name)[tokens]
        for field in fields(packed)
        if field.name != "cu_seqlens"
    }
    return replace(packed, **parts, cu_seqlens=packed.cu_seqlens[first : last + 1] - packed.cu_seqlens[first])
