"""Each axis of the objective against loops in Python floats (64 bit)."""

import math
import random

import pytest
import torch

from megarl.algorithms.advantages import group_advantages, spread_over_tokens
from megarl.algorithms.aggregation import token_weights
from megarl.algorithms.batches import build_policy_batch
from megarl.algorithms.kl import kl_estimate
from megarl.algorithms.objectives import policy_objective, select_tokens
from megarl.algorithms.policy_loss import clipped_policy_loss
from megarl.config.schema import AlgorithmConfig
from megarl.types import PackedBatch, TokenScores

RAGGED = [5, 1, 8, 3, 2, 6]  # sequence lengths
PROMPTS = [2, 1, 3, 3, 1, 2]  # of which prompt: the second and fourth have an empty response
GROUPS = [0, 0, 1, 1, 1, 2]


def ragged_batch(seed: int, rewards: list[float] | None = None) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    mask = [position >= prompt for length, prompt in zip(RAGGED, PROMPTS, strict=True) for position in range(length)]
    return PackedBatch(
        token_ids=torch.randint(0, 50, (sum(RAGGED),), generator=generator),
        cu_seqlens=torch.tensor([0, *RAGGED]).cumsum(0),
        loss_mask=torch.tensor(mask),
        sampler_logprobs=torch.zeros(sum(RAGGED)),
        group_ids=torch.tensor(GROUPS),
        rewards=torch.tensor(rewards or torch.randn(len(RAGGED), generator=generator).tolist()),
    )


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.5, 0.25, 1.0, 3.0], [1.0, 1.0, 2.0, 2.0, 2.0, -1.0]])
def test_group_advantages(divide: bool, rewards: list[float]) -> None:
    actual = group_advantages(torch.tensor(rewards), torch.tensor(GROUPS), divide_by_std=divide)
    for i, group in enumerate(GROUPS):
        members = [rewards[j] for j in range(len(rewards)) if GROUPS[j] == group]
        mean = sum(members) / len(members)
        expected = rewards[i] - mean
        if divide and len(members) > 1:
            expected /= math.sqrt(sum((r - mean) ** 2 for r in members) / (len(members) - 1)) + 1e-6
        assert actual[i].item() == pytest.approx(expected, abs=1e-6)
    if rewards[0] == rewards[1]:
        assert actual[:2].tolist() == [0.0, 0.0], "a group of equal rewards teaches nothing"


def test_advantages_reach_only_trained_tokens() -> None:
    batch = ragged_batch(0)
    values = spread_over_tokens(torch.arange(1.0, 7.0), batch.cu_seqlens, batch.loss_mask).tolist()
    expected = [float(i + 1) if p >= PROMPTS[i] else 0.0 for i, length in enumerate(RAGGED) for p in range(length)]
    assert values == expected


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_aggregation(aggregation: str) -> None:
    batch = ragged_batch(1)
    terms = torch.randn(sum(RAGGED), dtype=torch.float64, generator=torch.Generator().manual_seed(2)).tolist()
    weights = token_weights(batch.loss_mask, batch.cu_seqlens, aggregation).double()
    actual = sum(w * t for w, t in zip(weights.tolist(), terms, strict=True))
    per_sequence = []
    start = 0
    for length, prompt in zip(RAGGED, PROMPTS, strict=True):
        per_sequence.append(terms[start + prompt : start + length])
        start += length
    if aggregation == "token_mean":
        everything = [t for sequence in per_sequence for t in sequence]
        expected = sum(everything) / len(everything)
    else:
        expected = sum(sum(s) / len(s) if s else 0.0 for s in per_sequence) / len(per_sequence)
    assert actual == pytest.approx(expected, rel=1e-6)


def test_kl_estimators() -> None:
    rng = random.Random(0)
    for _ in range(50):
        logp, reference = rng.uniform(-5, 0), rng.uniform(-5, 0)
        r = math.exp(reference - logp)
        pair = torch.tensor([logp], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
        assert kl_estimate(*pair, "k1").item() == pytest.approx(-math.log(r))
        assert kl_estimate(*pair, "k2").item() == pytest.approx(math.log(r) ** 2 / 2)
        assert kl_estimate(*pair, "k3").item() == pytest.approx(r - 1 - math.log(r))


def test_clipped_loss_values_gradients_and_counts() -> None:
    rng = random.Random(1)
    low_count = high_count = 0
    for _ in range(200):
        logp, old, advantage = rng.uniform(-1, 0), rng.uniform(-1, 0), rng.uniform(-2, 2)
        ratio = math.exp(logp - old)
        bounded = min(max(ratio, 0.8), 1.28)
        expected = -min(ratio * advantage, bounded * advantage)
        stopped = (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
        x = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
        result = clipped_policy_loss(
            x, torch.tensor([old], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28
        )
        result.loss.sum().backward()
        assert result.loss.item() == pytest.approx(expected)
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(0.0 if stopped else -ratio * advantage)
        assert result.clipped_high.item() == (ratio > 1.28 and advantage > 0)
        assert result.clipped_low.item() == (ratio < 0.8 and advantage < 0)
        low_count, high_count = low_count + result.clipped_low.item(), high_count + result.clipped_high.item()
    assert low_count > 10 and high_count > 10


def test_objective_is_differentiable_numerically() -> None:
    config = AlgorithmConfig.model_validate(
        {"kl": {"place": "loss", "coefficient": 0.3, "estimator": "k2"}, "entropy_coefficient": 0.1}
    )
    packed = ragged_batch(3)
    generator = torch.Generator().manual_seed(4)
    old = torch.randn(sum(RAGGED), generator=generator, dtype=torch.float64) * 0.05
    reference = torch.randn(sum(RAGGED), generator=generator, dtype=torch.float64) * 0.5
    batch = build_policy_batch(packed, TokenScores(old=old, reference=reference), config)[0]
    index = packed.loss_mask.nonzero()[:, 0]
    data = select_tokens(batch, index, torch.device("cpu"))
    objective = policy_objective(config)
    logprobs = (old[index] + 0.01).requires_grad_()
    entropies = torch.rand(len(index), dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda lp, e: objective(lp, e, data).loss, (logprobs, entropies))


def test_mini_batches_have_their_own_normaliser_and_share_the_advantages() -> None:
    packed = ragged_batch(5)
    scores = TokenScores(old=torch.arange(float(sum(RAGGED))), reference=None)
    config = AlgorithmConfig.model_validate({"updates_per_step": 3, "aggregation": "token_mean"})
    whole = build_policy_batch(packed, scores, config.model_copy(update={"updates_per_step": 1}))[0]
    parts = build_policy_batch(packed, scores, config)
    assert [part.packed.num_sequences for part in parts] == [2, 2, 2]
    assert whole.advantages is not None
    assert torch.equal(torch.cat([part.advantages for part in parts if part.advantages is not None]), whole.advantages)
    assert torch.equal(torch.cat([part.scores.old for part in parts if part.scores]), scores.old)
    for part in parts:
        trained = int(part.packed.loss_mask.sum())
        assert part.token_weights.sum().item() == pytest.approx(1.0 if trained else 0.0)
