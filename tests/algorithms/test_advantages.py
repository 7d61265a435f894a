"""Advantages against loops over Python floats, and the special cases that the papers state."""

from dataclasses import replace

import pytest
import torch

import references
from megarl.algorithms.advantages import ADVANTAGES, AdvantageInput, whiten
from megarl.algorithms.sequences import spread_over_tokens
from megarl.config.checks.algorithm import GREEDY_ADVANTAGES
from ragged import EQUAL_REWARD_GROUP, GROUPS, TASKS, Ragged, assert_tokens, ragged

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def inputs_of(batch: Ragged, token_rewards: torch.Tensor) -> AdvantageInput:
    packed = batch.packed
    return AdvantageInput(
        rewards=packed.rewards,
        greedy_rewards=packed.greedy_rewards,
        token_rewards=token_rewards,
        step_rewards=packed.step_rewards,
        group_ids=packed.group_ids,
        task_ids=packed.task_ids,
        cu_seqlens=packed.cu_seqlens,
        loss_mask=packed.loss_mask,
        values=batch.outputs.values,
        discount=0.9,
        trace_decay=0.8,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_advantages(name: str, penalised: bool, dtype: torch.dtype) -> None:
    for seed in range(5):
        batch = ragged(seed, dtype)
        penalties = (batch.outputs.reference - batch.outputs.old) * 0.3 if penalised else torch.zeros_like(batch.outputs.old)
        actual = ADVANTAGES[name].function(inputs_of(batch, penalties))
        assert actual.dtype == dtype
        token_rewards, values = (
            [[x[p] for p in positions] for positions in batch.trained] for x in (penalties.tolist(), batch.outputs.values.tolist())
        )
        rewards, greedy = batch.packed.rewards.tolist(), batch.packed.greedy_rewards.tolist()
        known = {"tasks": TASKS, "steps": batch.steps(), "positions": batch.trained}
        expected = references.token_advantages(name, rewards, token_rewards, GROUPS, greedy, values, 0.9, 0.8, **known)
        assert_tokens(actual, expected, batch, TOLERANCE[dtype])


STANDARDISED = ("group_mean_std", "batch_mean_std", "group_mean_batch_std", "group_mean_task_std")


@pytest.mark.parametrize("name", STANDARDISED)
def test_a_kl_penalty_is_not_blown_up_where_rewards_are_equal(name: str) -> None:
    """Four right answers with KLs that differ by 1e-5: advantages of that size, not of that of a right answer among wrong ones."""
    inputs = AdvantageInput(
        rewards=torch.ones(4),
        greedy_rewards=torch.full((4,), torch.nan),
        token_rewards=torch.tensor([0.0, -1e-5, 0.0, -2e-5, 0.0, -1e-5, 0.0, 0.0]),
        step_rewards=torch.full((8,), torch.nan),
        group_ids=torch.zeros(4, dtype=torch.int64),
        task_ids=torch.zeros(4, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2, 4, 6, 8]),
        loss_mask=torch.tensor([False, True] * 4),
        values=None,
        discount=1.0,
        trace_decay=1.0,
    )
    actual = ADVANTAGES[name].function(inputs)
    assert actual.tolist() == pytest.approx([0, 0, 0, -1e-5, 0, 0, 0, 1e-5], abs=1e-9)
    unequal = replace(inputs, rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    # the rewards' deviation is 1 / sqrt(3): the penalty is what it was beside them
    expected = [0, 0.75**0.5, 0, -(0.75**0.5) - 1e-5, 0, 0.75**0.5, 0, -(0.75**0.5) + 1e-5]
    assert ADVANTAGES[name].function(unequal).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out", "group_mean_batch_std"])
def test_equal_rewards_and_groups_of_one_teach_nothing(name: str) -> None:
    batch = ragged(0)
    actual = ADVANTAGES[name].function(inputs_of(batch, torch.zeros_like(batch.outputs.old)))
    for group in (EQUAL_REWARD_GROUP, 3):
        members = [i for i in range(len(GROUPS)) if GROUPS[i] == group]
        assert all(abs(actual[p]) < 1e-9 for i in members for p in batch.trained[i])


def test_rloo_is_the_mean_baseline_times_g_over_g_minus_1() -> None:
    batch = ragged(1)
    inputs = inputs_of(batch, torch.zeros_like(batch.outputs.old))
    sizes = torch.tensor([GROUPS.count(group) for group in GROUPS], dtype=torch.float64)
    factor = spread_over_tokens(sizes / (sizes - 1).clamp(min=1), inputs.cu_seqlens, inputs.loss_mask)
    by_mean = ADVANTAGES["group_mean"].function(inputs)
    torch.testing.assert_close(ADVANTAGES["leave_one_out"].function(inputs), by_mean * factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whitening(dtype: torch.dtype) -> None:
    batch = ragged(2, dtype)
    values = torch.randn(batch.packed.loss_mask.numel(), dtype=dtype, generator=torch.Generator().manual_seed(3)) + 2
    expected = references.whitened([[float(values[p]) for p in positions] for positions in batch.trained])
    assert_tokens(whiten(values, batch.packed.loss_mask), expected, batch, TOLERANCE[dtype])
    nothing = torch.zeros_like(batch.packed.loss_mask)
    assert whiten(values * 0, nothing).tolist() == [0.0] * values.numel()


def test_greedy_baseline_by_hand() -> None:
    """Two responses "p r r" and "p" (empty) to one prompt, "p r" alone to another; penalties -0.1 and -0.2 on the first."""
    inputs = AdvantageInput(
        rewards=torch.tensor([1.0, 0.0, 0.5]),
        greedy_rewards=torch.tensor([0.25, 0.25, 2.0]),
        token_rewards=torch.tensor([0.0, -0.1, -0.2, 0.0, 0.0, 0.0]),
        step_rewards=torch.full((6,), torch.nan),
        group_ids=torch.tensor([0, 0, 1]),
        task_ids=torch.tensor([0, 0, 0]),
        cu_seqlens=torch.tensor([0, 3, 4, 6]),
        loss_mask=torch.tensor([False, True, True, False, False, True]),
        values=None,
        discount=1.0,
        trace_decay=1.0,
    )
    assert ADVANTAGES["greedy_baseline"].function(inputs).tolist() == pytest.approx([0, 0.45, 0.45, 0, 0, -1.5])
    assert {name for name, advantage in ADVANTAGES.items() if advantage.needs_greedy_response} == set(GREEDY_ADVANTAGES)


def test_process_rewards_by_hand() -> None:
    """One group, two responses "p r r r" and "p r": steps with rewards 1, 0 and 0.5 end at tokens 2, 3 and 5."""
    nan = torch.nan
    inputs = AdvantageInput(
        rewards=torch.tensor([7.0, -7.0]),  # of whole responses: not used
        greedy_rewards=torch.full((2,), nan),
        token_rewards=torch.zeros(6),
        step_rewards=torch.tensor([nan, nan, 1.0, 0.0, nan, 0.5]),
        group_ids=torch.tensor([0, 0]),
        task_ids=torch.tensor([0, 0]),
        cu_seqlens=torch.tensor([0, 4, 6]),
        loss_mask=torch.tensor([False, True, True, True, False, True]),
        values=None,
        discount=1.0,
        trace_decay=1.0,
    )
    # mean 0.5, sample standard deviation 0.5: normalised 1, -1, 0
    actual = ADVANTAGES["process_rewards"].function(inputs)
    assert actual.tolist() == pytest.approx([0, 0, 0, -1, 0, 0], abs=1e-5)
    without = replace(inputs, step_rewards=torch.full((6,), nan))
    assert ADVANTAGES["process_rewards"].function(without).tolist() == [0.0] * 6


def test_task_standard_deviation_by_hand() -> None:
    """Task 0 has rewards 0 and 2 in one group, task 1 has 0 and 20: both teach the same although one pays ten times as much."""
    inputs = AdvantageInput(
        rewards=torch.tensor([0.0, 2.0, 0.0, 20.0]),
        greedy_rewards=torch.full((4,), torch.nan),
        token_rewards=torch.zeros(8),
        step_rewards=torch.full((8,), torch.nan),
        group_ids=torch.tensor([0, 0, 1, 1]),
        task_ids=torch.tensor([0, 0, 1, 1]),
        cu_seqlens=torch.tensor([0, 2, 4, 6, 8]),
        loss_mask=torch.tensor([False, True] * 4),
        values=None,
        discount=1.0,
        trace_decay=1.0,
    )
    # (R - 1) / sqrt(2) and (R - 10) / sqrt(200)
    half = 0.5**0.5
    actual = ADVANTAGES["group_mean_task_std"].function(inputs)
    assert actual.tolist() == pytest.approx([0, -half, 0, half, 0, -half, 0, half], abs=1e-5)
