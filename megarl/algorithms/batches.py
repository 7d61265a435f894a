"""From a step's sequences to what each optimizer step learns from: advantages and token weights with their normaliser."""

from dataclasses import replace

from megarl.algorithms.advantages import group_advantages, spread_over_tokens
from megarl.algorithms.aggregation import token_weights
from megarl.config.schema import AlgorithmConfig
from megarl.types import PackedBatch, TokenScores, TrainBatch


def build_policy_batch(packed: PackedBatch, scores: TokenScores, config: AlgorithmConfig) -> list[TrainBatch]:
    """Advantages over whole groups, then the step's mini-batches, each with its own normaliser.

    Returns:
        ``config.updates_per_step`` batches of equally many consecutive sequences.
    """
    per_sequence = group_advantages(packed.rewards, packed.group_ids, divide_by_std=config.advantage == "group_mean_std")
    advantages = spread_over_tokens(per_sequence, packed.cu_seqlens, packed.loss_mask)
    size = packed.num_sequences // config.updates_per_step
    batches = []
    for first in range(0, size * config.updates_per_step, size):
        part = slice_sequences(packed, first, first + size)
        tokens = slice(int(packed.cu_seqlens[first]), int(packed.cu_seqlens[first + size]))
        batches.append(
            TrainBatch(
                packed=part,
                scores=TokenScores(
                    old=scores.old[tokens], reference=None if scores.reference is None else scores.reference[tokens]
                ),
                advantages=advantages[tokens],
                token_weights=token_weights(part.loss_mask, part.cu_seqlens, config.aggregation),
            )
        )
    return batches


def build_supervised_batch(packed: PackedBatch) -> TrainBatch:
    """Token-mean cross-entropy over the batch."""
    weights = token_weights(packed.loss_mask, packed.cu_seqlens, "token_mean")
    return TrainBatch(packed=packed, scores=None, advantages=None, token_weights=weights)


def slice_sequences(packed: PackedBatch, first: int, last: int) -> PackedBatch:
    """Sequences ``first:last`` as a batch of their own."""
    tokens = slice(int(packed.cu_seqlens[first]), int(packed.cu_seqlens[last]))
    return replace(
        packed,
        token_ids=packed.token_ids[tokens],
        cu_seqlens=packed.cu_seqlens[first : last + 1] - packed.cu_seqlens[first],
        loss_mask=packed.loss_mask[tokens],
        sampler_logprobs=packed.sampler_logprobs[tokens],
        group_ids=packed.group_ids[first:last],
        rewards=packed.rewards[first:last],
    )
