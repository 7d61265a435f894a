"""Which sequences are computed together, and ragged batches from rollouts or examples. Pure: no process group, no I/O."""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.data.template import PreferencePair, SFTExample
from megarl.errors import DataError
from megarl.types import NO_EXPERT, NO_VERSION, FinishReason, PackedBatch, Rollout, RolloutGroup, ScoredRollout


def plan_micro_batches(
    lengths: Sequence[int], work: Sequence[int], num_replicas: int, max_tokens: int, count_multiple: int = 1
) -> list[list[list[int]]]:
    """Share sequences among data parallel replicas and cut each share into micro-batches.

    Replicas get about equal work and exactly equal numbers of micro-batches (some may be empty), so that no rank waits for a
    micro-batch that another does not have; so do the micro-batches of a replica, as far as their tokens allow. The plan
    depends on the arguments only, so every rank can make it.

    Args:
        lengths: tokens of each sequence.
        work: of each sequence, in any unit; attention makes a long one more work than short ones of as many tokens.
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
    shares = _spread(range(len(lengths)), work, num_replicas)
    first_fit = [_first_fit(share, lengths, max_tokens) for share in shares]
    num_needed = max(1, *(len(bins) for bins in first_fit))
    num_micro_batches = -(-num_needed // count_multiple) * count_multiple
    plan = []
    for share, fitted in zip(shares, first_fit, strict=True):
        # Even micro-batches keep pipelines full and leave fewest empty; first-fit packs tighter where even ones overflow.
        even = _spread(share, work, num_micro_batches)
        if any(sum(lengths[i] for i in micro_batch) > max_tokens for micro_batch in even):
            even = fitted + [[] for _ in range(num_micro_batches - len(fitted))]
        plan.append([sorted(micro_batch) for micro_batch in even])
    return plan


def plan_group_micro_batches(
    group_ids: Sequence[int],
    lengths: Sequence[int],
    work: Sequence[int],
    num_replicas: int,
    max_tokens: int,
    count_multiple: int = 1,
) -> list[list[list[int]]]:
    """Plan as ``plan_micro_batches`` does, with adjacent sequences of the same group id in the same micro-batch.

    Raises:
        DataError: the sequences of one group have more than ``max_tokens`` tokens together.
    """
    groups = [
        [number for number, _ in members] for _, members in itertools.groupby(enumerate(group_ids), key=lambda member: member[1])
    ]
    sizes = [sum(lengths[number] for number in group) for group in groups]
    if max(sizes, default=0) > max_tokens:
        largest = sizes.index(max(sizes))
        raise DataError(
            f"group {largest}, sequences {groups[largest][0]} to {groups[largest][-1]}, has {sizes[largest]} tokens, above "
            f"max_tokens_per_micro_batch = {max_tokens}, and is computed together; raise it or shorten prompts and responses"
        )
    group_work = [sum(work[number] for number in group) for group in groups]
    plan = plan_micro_batches(sizes, group_work, num_replicas, max_tokens, count_multiple)
    return [[[number for index in micro_batch for number in groups[index]] for micro_batch in replica] for replica in plan]


def no_routing(num_tokens: int) -> Tensor:
    """Return ``routed_experts`` of a batch without routing replay."""
    return torch.zeros(num_tokens, 0, 0, dtype=torch.int16)


def with_scored_ends(packed: PackedBatch) -> PackedBatch:
    """Add one token (0) to each sequence, the only one whose prediction counts: what a model says at the last real token."""
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
        weight_versions=torch.full((is_end.numel(),), NO_VERSION),
        step_rewards=torch.full((is_end.numel(),), math.nan),
        routed_experts=no_routing(is_end.numel()),
    )


def _largest_first(indices: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-sizes[index], index))


def _spread(indices: Sequence[int], work: Sequence[int], num_bins: int) -> list[list[int]]:
    """Share out by the longest-processing-time rule: each sequence, that with most work first, goes to the bin with the least."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, bin_index) for bin_index in range(num_bins)]
    for index in _largest_first(indices, work):
        load, bin_index = loads[0]
        bins[bin_index].append(index)
        heapq.heapreplace(loads, (load + work[index], bin_index))
    return bins


def _first_fit(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack by first-fit decreasing: at most 11/9 of the fewest possible bins, plus one."""
    bins: list[list[int]] = []
    space: list[int] = []
    for index in _largest_first(indices, lengths):
        fitting = next((b for b, free in enumerate(space) if free >= lengths[index]), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            space.append(max_tokens)
        bins[fitting].append(index)
        space[fitting] -= lengths[index]
    return bins


def pack_groups(groups: Sequence[RolloutGroup], is_correct: Callable[[ScoredRollout], bool] | None = None) -> PackedBatch:
    """Concatenate all sampled responses of the groups, in order, each after its prompt; group ``i`` has group id ``i``.

    ``is_correct`` says so of each response; without it the batch does not.

    Tasks are numbered in the order in which they first come. A response without tokens is legal and adds nothing to
    ``loss_mask``. Of a greedy response only reward and length are kept.
    """
    task_ids = {task: number for number, task in enumerate(dict.fromkeys(group.prompt.task for group in groups))}
    packed = _pack(
        [_response(scored, group_id, task_ids, group.greedy) for group_id, group in enumerate(groups) for scored in group.rollouts]
    )
    if is_correct is None:
        return packed
    correct = [is_correct(scored) for group in groups for scored in group.rollouts]
    return replace(packed, correct=torch.tensor(correct, dtype=torch.bool))


def pack_examples(examples: Sequence[SFTExample]) -> PackedBatch:
    """Concatenate supervised examples, in order; each is a group of its own, its log-probs and reward are 0."""
    return _pack([_example(example, group_id) for group_id, example in enumerate(examples)])


def pack_pairs(pairs: Sequence[PreferencePair]) -> PackedBatch:
    """Concatenate preference pairs, in order: the chosen response of pair ``i`` is sequence 2i, the rejected one 2i + 1, and both
    have group id ``i``. Log-probs and rewards are 0."""
    return _pack([_example(example, group_id) for group_id, pair in enumerate(pairs) for example in (pair.chosen, pair.rejected)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """One sequence of a batch; what is per token begins after the prompt, but for ``routed_experts``, which has all tokens."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    step_rewards: Mapping[int, float]
    routed_experts: Tensor
    group_id: int
    task_id: int
    reward: float
    truncated: bool
    greedy_reward: float
    greedy_length: int


def _response(scored: ScoredRollout, group_id: int, task_ids: Mapping[str, int], greedy: ScoredRollout | None) -> _Sequence:
    rollout = scored.rollout
    return _Sequence(
        prompt=rollout.prompt.token_ids,
        token_ids=rollout.token_ids,
        loss_mask=rollout.from_policy,
        logprobs=rollout.logprobs,
        weight_versions=rollout.weight_versions,
        step_rewards=dict(scored.step_rewards),
        routed_experts=_known_experts(rollout),
        group_id=group_id,
        task_id=task_ids[rollout.prompt.task],
        reward=scored.reward,
        truncated=rollout.finish_reason is FinishReason.LENGTH,
        greedy_reward=math.nan if greedy is None else greedy.reward,
        greedy_length=0 if greedy is None else greedy.rollout.num_policy_tokens,
    )


def _known_experts(rollout: Rollout) -> Tensor:
    """Return ``routed_experts`` of prompt and response, NO_EXPERT for what the engine did not read."""
    num_tokens = len(rollout.prompt.token_ids) + len(rollout.token_ids)
    if rollout.routed_experts is None:
        return no_routing(num_tokens)
    return F.pad(rollout.routed_experts, (0, 0, 0, 0, 0, num_tokens - len(rollout.routed_experts)), value=NO_EXPERT)


def _example(example: SFTExample, group_id: int) -> _Sequence:
    response = example.token_ids[example.num_prompt_tokens :]
    return _Sequence(
        prompt=example.token_ids[: example.num_prompt_tokens],
        token_ids=response,
        loss_mask=(True,) * len(response),
        logprobs=(0.0,) * len(response),
        weight_versions=(NO_VERSION,) * len(response),
        step_rewards={},
        routed_experts=no_routing(len(example.token_ids)),
        group_id=group_id,
        task_id=0,
        reward=0.0,
        truncated=False,
        greedy_reward=math.nan,
        greedy_length=0,
    )


def _pack(sequences: Sequence[_Sequence]) -> PackedBatch:
    lengths = [len(sequence.prompt) + len(sequence.token_ids) for sequence in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    num_tokens = starts[-1]
    token_ids = numpy.empty(num_tokens, numpy.int64)
    loss_mask = numpy.zeros(num_tokens, numpy.bool_)
    logprobs = numpy.zeros(num_tokens, numpy.float32)
    versions = numpy.full(num_tokens, NO_VERSION, numpy.int64)
    step_rewards = numpy.full(num_tokens, math.nan, numpy.float32)
    for start, end, sequence in zip(starts, starts[1:], sequences, strict=False):
        num_prompt, num_response = len(sequence.prompt), len(sequence.token_ids)
        assert num_prompt > 0, "the first token of a sequence is never predicted"
        assert len(sequence.routed_experts) == num_prompt + num_response
        assert {len(sequence.loss_mask), len(sequence.logprobs), len(sequence.weight_versions)} == {num_response}
        response = slice(start + num_prompt, end)
        trained = numpy.array(sequence.loss_mask, numpy.bool_)
        token_ids[start : response.start] = sequence.prompt
        token_ids[response] = sequence.token_ids
        loss_mask[response] = trained
        logprobs[response] = numpy.where(trained, sequence.logprobs, 0.0)
        versions[response] = numpy.where(trained, sequence.weight_versions, NO_VERSION)
        for index, reward in sequence.step_rewards.items():
            step_rewards[response][index] = reward
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int64),
        loss_mask=torch.from_numpy(loss_mask),
        sampler_logprobs=torch.from_numpy(logprobs),
        weight_versions=torch.from_numpy(versions),
        step_rewards=torch.from_numpy(step_rewards),
        routed_experts=torch.cat([sequence.routed_experts for sequence in sequences]),
        group_ids=torch.tensor([sequence.group_id for sequence in sequences], dtype=torch.int64),
        task_ids=torch.tensor([sequence.task_id for sequence in sequences], dtype=torch.int64),
        rewards=torch.tensor([sequence.reward for sequence in sequences], dtype=torch.float32),
        truncated=torch.tensor([sequence.truncated for sequence in sequences], dtype=torch.bool),
        greedy_rewards=torch.tensor([sequence.greedy_reward for sequence in sequences], dtype=torch.float32),
        greedy_lengths=torch.tensor([sequence.greedy_length for sequence in sequences], dtype=torch.int64),
    )
