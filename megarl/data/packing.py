"""Which sequences are computed together, and ragged batches from rollouts or examples. Pure: no process group, no I/O."""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from megarl.data.template import SFTExample
from megarl.errors import DataError
from megarl.types import FinishReason, PackedBatch, RolloutGroup


def plan_micro_batches(
    lengths: Sequence[int], num_replicas: int, max_tokens: int, count_multiple: int = 1
) -> list[list[list[int]]]:
    """Share sequences among data parallel replicas and cut each share into micro-batches.

    Replicas get about equal numbers of tokens and exactly equal numbers of micro-batches (some may be empty), so that no rank
    waits for a micro-batch that another does not have. The plan depends on the arguments only, so every rank can make it.

    Args:
        lengths: tokens of each sequence.
        num_replicas: data parallel size.
        max_tokens: most tokens in one micro-batch.
        count_multiple: the number of micro-batches is a multiple of this (the interleaved pipeline schedule needs it).

    Returns:
        ``plan[replica][micro_batch]`` is a list of sequence indices, ascending; every sequence is in exactly one.

    Raises:
        DataError: one sequence is longer than ``max_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise DataError(
            f"sequence {list(lengths).index(longest)} has {longest} tokens, above max_tokens_per_micro_batch = {max_tokens}; "
            "raise it or shorten prompts and responses"
        )
    shares = _spread(range(len(lengths)), lengths, num_replicas)
    first_fit = [_first_fit(share, lengths, max_tokens) for share in shares]
    num_needed = max(1, *(len(bins) for bins in first_fit))
    num_micro_batches = -(-num_needed // count_multiple) * count_multiple
    plan = []
    for share, fitted in zip(shares, first_fit, strict=True):
        # Even micro-batches keep pipelines full and leave fewest empty; first-fit packs tighter where even ones overflow.
        even = _spread(share, lengths, num_micro_batches)
        if any(sum(lengths[i] for i in micro_batch) > max_tokens for micro_batch in even):
            even = fitted + [[] for _ in range(num_micro_batches - len(fitted))]
        plan.append([sorted(micro_batch) for micro_batch in even])
    return plan


def with_scored_ends(packed: PackedBatch) -> PackedBatch:
    """Each sequence with one more token (0), the only one whose prediction counts: what a model says at the last real token."""
    num_tokens, num_sequences = packed.token_ids.numel(), packed.num_sequences
    is_end = torch.zeros(num_tokens + num_sequences, dtype=torch.bool)
    is_end[packed.cu_seqlens[1:] + torch.arange(num_sequences)] = True
    token_ids = torch.zeros(is_end.numel(), dtype=packed.token_ids.dtype)
    token_ids[~is_end] = packed.token_ids
    return replace(
        packed,
        token_ids=token_ids,
        cu_seqlens=packed.cu_seqlens + torch.arange(num_sequences + 1),
        loss_mask=is_end,
        sampler_logprobs=torch.zeros(is_end.numel()),
    )


def _longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-lengths[index], index))


def _spread(indices: Sequence[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Longest-processing-time rule: each sequence, longest first, goes to the bin with the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, bin_index) for bin_index in range(num_bins)]
    for index in _longest_first(indices, lengths):
        load, bin_index = loads[0]
        bins[bin_index].append(index)
        heapq.heapreplace(loads, (load + lengths[index], bin_index))
    return bins


def _first_fit(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible bins, plus one."""
    bins: list[list[int]] = []
    space: list[int] = []
    for index in _longest_first(indices, lengths):
        fitting = next((b for b, free in enumerate(space) if free >= lengths[index]), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            space.append(max_tokens)
        bins[fitting].append(index)
        space[fitting] -= lengths[index]
    return bins


def pack_groups(groups: Sequence[RolloutGroup]) -> PackedBatch:
    """Concatenate all sampled responses of the groups, in order, each after its prompt; group ``i`` has group id ``i``.

    A response without tokens is legal and adds nothing to ``loss_mask``. Of a greedy response only reward and length are kept.
    """
    members = [(group_id, scored) for group_id, group in enumerate(groups) for scored in group.rollouts]
    rollouts = [scored.rollout for _, scored in members]
    greedy = [groups[group_id].greedy for group_id, _ in members]
    return _pack(
        sequences=[(*rollout.prompt.token_ids, *rollout.token_ids) for rollout in rollouts],
        num_prompt_tokens=[len(rollout.prompt.token_ids) for rollout in rollouts],
        response_logprobs=[rollout.logprobs for rollout in rollouts],
        group_ids=[group_id for group_id, _ in members],
        rewards=[scored.reward for _, scored in members],
        truncated=[rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts],
        greedy_rewards=[math.nan if scored is None else scored.reward for scored in greedy],
        greedy_lengths=[0 if scored is None else len(scored.rollout.token_ids) for scored in greedy],
    )


def pack_examples(examples: Sequence[SFTExample]) -> PackedBatch:
    """Concatenate supervised examples, in order; each is a group of its own, its log-probabilities and reward are 0."""
    return _pack(
        sequences=[example.token_ids for example in examples],
        num_prompt_tokens=[example.num_prompt_tokens for example in examples],
        response_logprobs=[(0.0,) * (len(example.token_ids) - example.num_prompt_tokens) for example in examples],
        group_ids=list(range(len(examples))),
        rewards=[0.0] * len(examples),
        truncated=[False] * len(examples),
        greedy_rewards=[math.nan] * len(examples),
        greedy_lengths=[0] * len(examples),
    )


def _pack(
    sequences: Sequence[Sequence[int]],
    num_prompt_tokens: Sequence[int],
    response_logprobs: Sequence[Sequence[float]],
    group_ids: list[int],
    rewards: list[float],
    truncated: list[bool],
    greedy_rewards: list[float],
    greedy_lengths: list[int],
) -> PackedBatch:
    loss_mask: list[bool] = []
    sampler_logprobs: list[float] = []
    for sequence, num_prompt, logprobs in zip(sequences, num_prompt_tokens, response_logprobs, strict=True):
        assert num_prompt > 0, "the first token of a sequence is never predicted"
        assert num_prompt + len(logprobs) == len(sequence)
        loss_mask += [False] * num_prompt + [True] * len(logprobs)
        sampler_logprobs += [0.0] * num_prompt + list(logprobs)
    return PackedBatch(
        token_ids=torch.tensor(list(itertools.chain.from_iterable(sequences)), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(map(len, sequences))], dtype=torch.int64),
        loss_mask=torch.tensor(loss_mask, dtype=torch.bool),
        sampler_logprobs=torch.tensor(sampler_logprobs, dtype=torch.float32),
        group_ids=torch.tensor(group_ids, dtype=torch.int64),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        truncated=torch.tensor(truncated, dtype=torch.bool),
        greedy_rewards=torch.tensor(greedy_rewards, dtype=torch.float32),
        greedy_lengths=torch.tensor(greedy_lengths, dtype=torch.int64),
    )
