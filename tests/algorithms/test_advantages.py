"""Advantages against loops over Python floats, and the special cases that the papers state."""

import math

import pytest
import torch

import references
from megarl.algorithms.advantages import (
    ADVANTAGES,
    AdvantageInput,
    group_mean_task_std,
    process_rewards,
    whiten,
)
from megarl.algorithms.sequences import spread_over_tokens
from megarl.config.algorithm_checks import GREEDY_ADVANTAGES
from ragged import EQUAL_REWARD_GROUP, GROUPS, SEQUENCES, TASKS, Ragged, assert_tokens, ragged

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def inputs_of(batch: Ragged, token_rewards: torch.Tensor) -> AdvantageInput:
    packed = batch.packed
    return AdvantageInput(
        rewards=packed.rewards,
        greedy_rewards=packed.greedy_rewards,
        token_rewards=token_rewards,
        group_ids=packed.group_ids,
        cu_seqlens=packed.cu_seqlens,
        loss_mask=packed.loss_mask,
        values=batch.scores.values,
        discount=0.9,
        trace_decay=0.8,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_advantages(name: str, penalised: bool, dtype: torch.dtype) -> None:
    for seed in range(5):
        batch = ragged(seed, dtype)
        penalties = (batch.scores.reference - batch.scores.old) * 0.3 if penalised else torch.zeros_like(batch.scores.old)
        actual = ADVANTAGES[name].function(inputs_of(batch, penalties))
        assert actual.dtype == dtype
        token_rewards, values = (
            [[x[p] for p in positions] for positions in batch.trained] for x in (penalties.tolist(), batch.scores.values.tolist())
        )
        rewards, greedy = batch.packed.rewards.tolist(), batch.packed.greedy_rewards.tolist()
        expected = references.token_advantages(name, rewards, token_rewards, GROUPS, greedy, values, 0.9, 0.8)
        assert_tokens(actual, expected, batch, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out", "group_mean_batch_std"])
def test_equal_rewards_and_groups_of_one_teach_nothing(name: str) -> None:
    batch = ragged(0)
    actual = ADVANTAGES[name].function(inputs_of(batch, torch.zeros_like(batch.scores.old)))
    for group in (EQUAL_REWARD_GROUP, 3):
        members = [i for i in range(len(GROUPS)) if GROUPS[i] == group]
        assert all(abs(actual[p]) < 1e-9 for i in members for p in batch.trained[i])


def test_rloo_is_the_mean_baseline_times_g_over_g_minus_1() -> None:
    batch = ragged(1)
    inputs = inputs_of(batch, torch.zeros_like(batch.scores.old))
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
        group_ids=torch.tensor([0, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 4, 6]),
        loss_mask=torch.tensor([False, True, True, False, False, True]),
        values=None,
        discount=1.0,
        trace_decay=1.0,
    )
    assert ADVANTAGES["greedy_baseline"].function(inputs).tolist() == pytest.approx([0, 0.45, 0.45, 0, 0, -1.5])
    assert {name for name, advantage in ADVANTAGES.items() if advantage.needs_greedy_response} == set(GREEDY_ADVANTAGES)


def test_task_standard_deviation() -> None:
    returns = ragged(3).packed.rewards
    actual = group_mean_task_std(returns, torch.tensor(GROUPS), torch.tensor(TASKS)).tolist()
    values = returns.tolist()
    for i, value in enumerate(values):
        group = [values[j] for j in range(len(values)) if GROUPS[j] == GROUPS[i]]
        task = [values[j] for j in range(len(values)) if TASKS[j] == TASKS[i]]
        expected = (value - references.mean(group)) / (references.sample_std(task) + 1e-6)
        assert actual[i] == pytest.approx(expected, abs=1e-9)


def test_process_rewards_by_hand() -> None:
    """One group, two responses "p r r | r" and "p r": steps end at tokens 2 and 3, and 5."""
    step_rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    actual = process_rewards(
        step_rewards,
        torch.tensor([2, 3, 5]),
        torch.tensor([0, 0, 0]),
        torch.tensor([0, 4, 6]),
        torch.tensor([False, True, True, True, False, True]),
    )
    # mean 0.5, sample standard deviation 0.5: normalised 1, -1, 0
    assert actual.tolist() == pytest.approx([0, 0, 0, -1, 0, 0], abs=1e-5)


def test_process_rewards() -> None:
    batch = ragged(4)
    generator = torch.Generator().manual_seed(5)
    steps = []  # reward, last token, sequence
    for number, positions in enumerate(batch.trained):
        for count, position in enumerate(positions):
            if count % 2 == 1 or position == positions[-1]:
                steps.append((float(torch.randn((), generator=generator)), position, number))
    actual = process_rewards(
        torch.tensor([reward for reward, _, _ in steps], dtype=torch.float64),
        torch.tensor([end for _, end, _ in steps]),
        torch.tensor([GROUPS[number] for _, _, number in steps]),
        batch.packed.cu_seqlens,
        batch.packed.loss_mask,
    )
    expected = []
    for number, positions in enumerate(batch.trained):
        group = [reward for reward, _, other in steps if GROUPS[other] == GROUPS[number]]
        row = []
        for position in positions:
            later = [reward for reward, end, other in steps if other == number and end >= position]
            row.append(sum((reward - references.mean(group)) / (references.sample_std(group) + 1e-6) for reward in later))
        expected.append(row)
    assert_tokens(actual, expected, batch, 1e-9)
    assert math.isfinite(float(actual.sum())) and len(SEQUENCES) == len(expected)
