"""The store of pending groups, and which of them are trained on next."""

import itertools
import json
import random

import pytest

from megarl.engines.protocol import Generation, resumed
from megarl.rollout.pending_groups import NOTHING_YET, PendingGroup, PendingGroups, Tickets, joined, next_batch
from megarl.types import FinishReason, Prompt, RolloutGroup
from tiny_rollout import sampling


def prompt(number: int) -> Prompt:
    return Prompt(prompt_id=f"train/{number}", token_ids=(1, 2), text="", reference={"answer": number}, task="train")


def score(group: PendingGroup) -> None:
    group.scored = RolloutGroup(prompt=group.prompt, rollouts=(), greedy=None)


def generation(tokens: tuple[int, ...], version: int, reason: FinishReason) -> Generation:
    return Generation(
        token_ids=tokens, logprobs=tuple(-float(t) for t in tokens), weight_versions=(version,) * len(tokens), finish_reason=reason
    )


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
@pytest.mark.parametrize("chance", [0.05, 0.3, 0.9])
def test_no_group_is_trained_later_than_the_bound_and_none_blocks_for_ever(max_staleness: int, chance: float) -> None:
    """Groups that become whole in random order, under AReaL's bound on groups begun; 60 updates of 3 groups."""
    size, store, dice = 3, PendingGroups(), random.Random(max_staleness)
    for version in range(60):
        while store.num_begun < (version + max_staleness + 1) * size:  # AReaL: floor((N - 1) / B) <= version + staleness
            store.begin(prompt(store.num_begun), version, 1)
        while (batch := next_batch(store.groups, version, max_staleness, size)) is None:
            unfinished = [group for group in store.groups if group.scored is None]
            assert unfinished, "all are whole and there is no batch"
            for group in unfinished:
                if dice.random() < chance:
                    score(group)
        assert len(batch) == size
        assert all(version - group.begun_version <= max_staleness for group in batch)
        _, tickets = store.take(batch)
        assert tickets.trained == tuple((group.ticket, f"train/{group.ticket}") for group in batch)


def test_a_straggler_is_waited_for_only_when_it_is_due() -> None:
    """Four groups begun at version 0 for steps of two, which may be trained at versions 0 and 1."""
    store = PendingGroups()
    groups = [store.begin(prompt(number), 0, 1) for number in range(4)]
    for group in groups[1:]:
        score(group)
    assert next_batch(groups, 0, 1, 2) == groups[1:3]  # group 0 may still be trained at version 1
    store.take(groups[1:3])
    assert next_batch(store.groups, 1, 1, 2) is None  # and must be
    score(groups[0])
    assert next_batch(store.groups, 1, 1, 2) == [groups[0], groups[3]]


def test_the_store_survives_a_checkpoint_and_every_ticket_is_somewhere_once() -> None:
    store, other = PendingGroups(), PendingGroups()
    groups = [store.begin(prompt(number), number, 2) for number in range(6)]
    groups[1].samples[0] = generation((5, 6), 3, FinishReason.STOP)
    score(groups[3])
    store.drop(groups[2])
    prompts = {prompt(number).prompt_id: prompt(number) for number in range(6)}
    other.restore(json.loads(json.dumps(store.state())), prompts.__getitem__)
    assert other.groups == store.groups == [groups[0], groups[1], *groups[3:]]
    assert other.groups[1].unfinished == [1]
    _, tickets = other.take(other.groups[2:3])
    assert tickets == Tickets(trained=((3, "train/3"),), dropped=((2, "train/2"),))
    left = [group.ticket for group in other.groups]
    assert sorted([*left, *(ticket for ticket, _ in tickets.trained + tickets.dropped)]) == list(range(other.num_begun))
    score(other.groups[0])
    assert other.take(other.groups[:1])[1].dropped == ()  # named once


def test_a_response_is_whole_when_it_ends_or_has_all_tokens() -> None:
    first = joined(NOTHING_YET, generation((5, 6), 3, FinishReason.LENGTH), 5)
    assert first == generation((5, 6), 3, FinishReason.ABORT)  # a budget of 2 tokens was used up
    second = joined(first, generation((7,), 4, FinishReason.ABORT), 5)
    assert second.token_ids == (5, 6, 7) and second.logprobs == (-5.0, -6.0, -7.0) and second.weight_versions == (3, 3, 4)
    assert second.finish_reason is FinishReason.ABORT
    assert joined(second, generation((8, 9), 4, FinishReason.LENGTH), 5).finish_reason is FinishReason.LENGTH
    assert joined(second, generation((8,), 4, FinishReason.STOP), 5).finish_reason is FinishReason.STOP


def test_no_two_continuations_share_their_random_numbers() -> None:
    aborts = [resumed(sampling(seed=seed), index, length) for seed, index, length in itertools.product((1, 2), (0, 1), (0, 3, 4))]
    assert len({abort.seed for abort in aborts}) == len(aborts)
    assert all(0 <= abort.seed < 2**62 for abort in aborts)
    assert {abort.max_new_tokens for abort in aborts} == {12, 9, 8} and {abort.num_samples for abort in aborts} == {1}
    assert aborts == [resumed(sampling(seed=seed), i, n) for seed, i, n in itertools.product((1, 2), (0, 1), (0, 3, 4))]
