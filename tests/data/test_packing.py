import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from megarl.algorithms.batches import slice_sequences
from megarl.data.packing import pack_examples, pack_groups, plan_micro_batches, with_scored_ends
from megarl.data.template import SFTExample
from megarl.errors import DataError
from megarl.types import GREEDY_INDEX, NO_EXPERT, FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout


@pytest.mark.parametrize("seed", range(60))
def test_plan_keeps_every_promise_on_random_lengths(seed):
    draw = random.Random(seed)
    max_tokens = draw.choice([50, 128, 1000])
    lengths = [draw.randint(1, draw.choice([10, max_tokens])) for _ in range(draw.randint(0, 80))]
    num_replicas, multiple = draw.randint(1, 5), draw.choice([1, 2, 3, 4])
    work = [length * (50 + length) for length in lengths]
    plan = plan_micro_batches(lengths, work, num_replicas, max_tokens, multiple)

    assert len(plan) == num_replicas
    counts = {len(replica) for replica in plan}
    assert len(counts) == 1
    assert min(counts) > 0
    assert min(counts) % multiple == 0
    micro_batches = list(itertools.chain.from_iterable(plan))
    assert sorted(itertools.chain.from_iterable(micro_batches)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in micro_batch) <= max_tokens for micro_batch in micro_batches)
    loads = [sum(work[i] for micro_batch in replica for i in micro_batch) for replica in plan]
    assert max(loads) - min(loads) <= max(work, default=0)
    assert plan == plan_micro_batches(list(lengths), list(work), num_replicas, max_tokens, multiple)


def fewest_bins(lengths, max_tokens):
    """The optimum by exhaustive search."""

    def fits(remaining, space):
        if not remaining:
            return True
        first, *rest = remaining
        tried = set()
        for b, free in enumerate(space):
            if free >= first and free not in tried:
                tried.add(free)
                if fits(rest, [*space[:b], free - first, *space[b + 1 :]]):
                    return True
        return False

    ordered = sorted(lengths, reverse=True)
    return next(count for count in itertools.count(1) if fits(ordered, [max_tokens] * count))


@pytest.mark.parametrize("seed", range(40))
def test_number_of_micro_batches_is_near_the_optimum(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 9))]
    (replica,) = plan_micro_batches(lengths, lengths, 1, 20)
    assert len(replica) <= fewest_bins(lengths, 20) * 11 / 9 + 1


def test_a_long_sequence_outweighs_short_ones_of_as_many_tokens():
    lengths = [80, 10, 10, 10, 10, 10, 10, 10, 10]
    (alone,), (together,) = plan_micro_batches(lengths, [length**2 for length in lengths], 2, 1000)
    assert (alone, together) == ([0], [1, 2, 3, 4, 5, 6, 7, 8])
    lengths = [60, 60, 20, 20, 20, 20, 20, 20]
    plan = plan_micro_batches(lengths, [length**2 for length in lengths], 2, 90)
    assert [[sum(lengths[i] ** 2 for i in part) for part in replica] for replica in plan] == [[3600, 1200]] * 2


def test_tight_packing_where_even_spreading_overflows():
    (replica,) = plan_micro_batches([6, 5, 4, 3, 2], [6, 5, 4, 3, 2], 1, 10)
    assert sorted(replica) == [[0, 2], [1, 3, 4]]


def test_no_needlessly_empty_micro_batch():
    plan = plan_micro_batches([10] * 8, [1] * 8, 2, 100, count_multiple=4)
    assert [[len(micro_batch) for micro_batch in replica] for replica in plan] == [[1, 1, 1, 1]] * 2


def test_more_replicas_than_sequences():
    assert sorted(plan_micro_batches([3], [1], 3, 5)) == [[[]], [[]], [[0]]]


def test_sequence_above_the_limit_is_an_error():
    with pytest.raises(DataError, match="sequence 1 has 6 tokens, above max_tokens_per_micro_batch = 5"):
        plan_micro_batches([5, 6, 1], [1, 1, 1], 1, 5)


def group(prompt_ids, *responses, greedy=None):
    prompt = Prompt(prompt_id="train/0", token_ids=prompt_ids, text="", reference={}, task="train")

    def scored(index, reward, response):
        rollout = Rollout(
            prompt=prompt,
            sample_index=index,
            token_ids=tuple(token for token, _ in response),
            from_policy=(True,) * len(response),
            logprobs=tuple(logprob for _, logprob in response),
            weight_versions=(4,) * len(response),
            finish_reason=FinishReason.STOP,
            text="",
        )
        return ScoredRollout(rollout=rollout, reward=reward, parts={}, step_rewards=(), failures=())

    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(scored(index, *response) for index, response in enumerate(responses)),
        greedy=None if greedy is None else scored(GREEDY_INDEX, *greedy),
    )


def test_groups_are_packed_as_the_types_say():
    packed = pack_groups(
        [group((7, 8), (1.0, [(9, -0.5), (10, -0.25)]), (0.5, [])), group((11,), (-1.0, [(12, -2.0)]))],
    )
    assert packed.token_ids.tolist() == [7, 8, 9, 10, 7, 8, 11, 12]
    assert packed.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert packed.loss_mask.tolist() == [False, False, True, True, False, False, False, True]
    assert packed.sampler_logprobs.tolist() == [0, 0, -0.5, -0.25, 0, 0, 0, -2.0]
    assert packed.group_ids.tolist() == [0, 0, 1]
    assert packed.rewards.tolist() == [1.0, 0.5, -1.0]
    assert packed.sequence_lengths.tolist() == [4, 2, 2]
    dtypes = [packed.token_ids, packed.cu_seqlens, packed.loss_mask, packed.sampler_logprobs, packed.group_ids, packed.rewards]
    assert [t.dtype for t in dtypes] == [torch.int64, torch.int64, torch.bool, torch.float32, torch.int64, torch.float32]


def test_what_an_environment_said_is_not_trained_on():
    plain = group((7, 8), (1.0, [(9, -0.5), (10, -0.25), (11, -3.0)]))
    (scored,) = plain.rollouts
    rollout = replace(scored.rollout, from_policy=(True, False, True), weight_versions=(4, 4, 5))
    packed = pack_groups([replace(plain, rollouts=(replace(scored, rollout=rollout, step_rewards=((0, 0.5), (2, -1.0))),))])
    assert packed.token_ids.tolist() == [7, 8, 9, 10, 11]
    assert packed.loss_mask.tolist() == [False, False, True, False, True]
    assert packed.sampler_logprobs.tolist() == [0, 0, -0.5, 0, -3.0]
    assert packed.weight_versions.tolist() == [-1, -1, 4, -1, 5]
    nan = math.nan
    assert packed.step_rewards.tolist() == pytest.approx([nan, nan, 0.5, nan, -1.0], nan_ok=True)


def test_experts_are_those_of_prompt_and_response():
    plain = [group((7, 8), (1.0, [(9, -0.5)]), (0.5, [])), group((11,), (-1.0, [(12, -2.0)]))]
    assert pack_groups(plain).routed_experts.shape == (7, 0, 0)
    experts = torch.arange(4 * 3 * 2, dtype=torch.int16).view(4, 3, 2)  # of all tokens but the last of each response, in 3 layers
    remaining = iter([experts[:2], experts[2:3], experts[3:]])
    groups = [
        replace(
            one,
            rollouts=tuple(
                replace(scored, rollout=replace(scored.rollout, routed_experts=next(remaining))) for scored in one.rollouts
            ),
        )
        for one in plain
    ]
    packed = pack_groups(groups)
    unknown = torch.full((1, 3, 2), NO_EXPERT, dtype=torch.int16)
    expected = torch.cat([experts[:2], unknown, experts[2:3], unknown, experts[3:], unknown])
    assert packed.routed_experts.dtype == torch.int16 and torch.equal(packed.routed_experts, expected)
    assert torch.equal(slice_sequences(packed, 1, 3).routed_experts, expected[3:])
    assert with_scored_ends(packed).routed_experts.shape == (10, 0, 0)  # a reward model routes for itself


def test_tasks_are_numbered_as_they_come():
    groups = [group((7,), (1.0, [(9, -0.5)]), (0.0, [(9, -0.5)])), group((8,), (1.0, [(9, -0.5)])), group((7,), (0.5, []))]
    second = replace(groups[1].rollouts[0].rollout, prompt=replace(groups[1].prompt, task="other"))
    groups[1] = replace(groups[1], prompt=second.prompt, rollouts=(replace(groups[1].rollouts[0], rollout=second),))
    assert pack_groups(groups).task_ids.tolist() == [0, 0, 1, 0]


def test_a_greedy_response_leaves_its_reward_and_length_only():
    plain = [group((7, 8), (1.0, [(9, -0.5), (10, -0.25)]), (0.5, [])), group((11,), (-1.0, [(12, -2.0)]))]
    with_greedy = [
        group((7, 8), (1.0, [(9, -0.5), (10, -0.25)]), (0.5, []), greedy=(0.25, [(13, -0.1), (14, -0.2), (15, -0.3)])),
        group((11,), (-1.0, [(12, -2.0)]), greedy=(2.0, [])),
    ]
    packed, expected = pack_groups(with_greedy), pack_groups(plain)
    assert packed.greedy_rewards.tolist() == [0.25, 0.25, 2.0]
    assert packed.greedy_lengths.tolist() == [3, 3, 0]
    assert (packed.greedy_rewards.dtype, packed.greedy_lengths.dtype) == (torch.float32, torch.int64)
    for name in ("token_ids", "cu_seqlens", "loss_mask", "sampler_logprobs", "group_ids", "rewards", "truncated"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), name
    assert expected.greedy_rewards.isnan().all() and not expected.greedy_lengths.any()


def test_examples_train_on_their_responses_only():
    packed = pack_examples(
        [
            SFTExample(row_id="train/0", token_ids=(1, 2, 3), num_prompt_tokens=2),
            SFTExample(row_id="train/1", token_ids=(4, 5, 6), num_prompt_tokens=1),
        ]
    )
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.cu_seqlens.tolist() == [0, 3, 6]
    assert packed.loss_mask.tolist() == [False, False, True, False, True, True]
    assert packed.group_ids.tolist() == [0, 1]
    assert not packed.sampler_logprobs.any()
    assert not packed.rewards.any()
