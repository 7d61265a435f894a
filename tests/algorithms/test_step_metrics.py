"""Metrics of a step from its updates, and logged divergences, against numbers worked by hand and exact expectations."""

import math
from typing import Any

import pytest
import torch

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.step_metrics import BatchMetrics, combined, step_metrics
from megarl.config.schema import AlgorithmConfig
from megarl.data.packing import no_routing
from megarl.types import PackedBatch, TokenOutputs, UpdateResult
from methods import objective_of
from ragged import LONGEST


def update(num_tokens: int = 10, num_sequences: int = 4, norm: float = 1.0, **metrics: float) -> UpdateResult:
    return UpdateResult(
        metrics=metrics,
        gradient_norm=norm,
        learning_rate=0.5,
        skipped=not math.isfinite(norm),
        empty=norm == 0,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )


def test_a_token_mean_is_over_the_step_s_tokens_and_an_extreme_over_all() -> None:
    metrics = step_metrics(
        [
            update(2, entropy=2.0, ratio_max=3.0, ratio_min=0.5, loss=1.0, norm=4.0),
            update(18, entropy=1.0, ratio_max=1.0, ratio_min=0.7, loss=3.0, norm=2.0),
        ]
    )
    assert metrics == pytest.approx(
        {"entropy": 1.1, "ratio_max": 3.0, "ratio_min": 0.5, "loss": 2.0, "gradient_norm": 3.0, "gradient_norm_max": 4.0}
        | {"learning_rate": 0.5, "skipped_updates": 0.0, "empty_updates": 0.0}
    )


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_skipped_and_empty_updates_count_as_such_and_leave_the_rest_alone(norm: float) -> None:
    good = update(18, entropy=1.0, loss=3.0, norm=2.0)
    bad, empty = update(2, entropy=math.nan, loss=math.nan, norm=norm), update(0, norm=0.0)
    metrics = step_metrics([bad, good, empty])
    assert metrics == step_metrics([good]) | {"skipped_updates": 1.0, "empty_updates": 1.0}
    assert all(math.isfinite(value) for value in metrics.values())
    assert "entropy" not in step_metrics([empty]) and "entropy" not in step_metrics([bad])
    assert step_metrics([]) == {}


def test_pairs_of_several_batches_are_one_set_of_pairs() -> None:
    parts = [
        BatchMetrics(metrics={"accuracy": 1.0, "entropy": 3.0}, num_tokens=10, num_sequences=6),
        BatchMetrics(metrics={"accuracy": 0.0, "entropy": 1.0}, num_tokens=30, num_sequences=2),
    ]
    assert combined(parts) == pytest.approx({"accuracy": 0.75, "entropy": 1.5})


# Probabilities of a vocabulary of four in twentieths, so that a batch can hold every token as often as the policy samples it.
OLD = (10, 6, 3, 1)
OTHERS = ((8, 6, 4, 2), (2, 2, 6, 10), (19.9997, 0.0001, 0.0001, 0.0001))


def divergence(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    return sum(p / 20 * math.log(p / q) for p, q in zip(first, second, strict=True))


def whole_distribution(settings: dict[str, Any], new: tuple[float, ...], reference: tuple[float, ...]) -> dict[str, float]:
    """What a step logs whose twenty responses of one token are distributed as OLD says."""
    tokens = [token for token, count in enumerate(OLD) for _ in range(count)]

    def logprobs(distribution: tuple[float, ...]) -> torch.Tensor:
        values = torch.zeros(40, dtype=torch.float64)
        values[1::2] = torch.tensor([math.log(distribution[token] / 20) for token in tokens], dtype=torch.float64)
        return values

    mask = torch.arange(40) % 2 == 1
    packed = PackedBatch(
        token_ids=torch.zeros(40, dtype=torch.int64),
        cu_seqlens=torch.arange(0, 41, 2),
        loss_mask=mask,
        sampler_logprobs=logprobs(OLD),
        weight_versions=torch.where(mask, 0, -1),
        step_rewards=torch.full((40,), torch.nan),
        routed_experts=no_routing(40),
        group_ids=torch.zeros(20, dtype=torch.int64),
        task_ids=torch.zeros(20, dtype=torch.int64),
        rewards=torch.rand(20, generator=torch.Generator().manual_seed(0)),
        truncated=torch.arange(20) % 3 == 0,
        greedy_rewards=torch.zeros(20),
        greedy_lengths=torch.zeros(20, dtype=torch.int64),
    )
    outputs = TokenOutputs(old=logprobs(OLD), entropies=torch.zeros(40), reference=logprobs(reference), values=None)
    algorithm = Algorithm(AlgorithmConfig.model_validate(settings), LONGEST)
    prepared = algorithm.prepare(packed, outputs, 0)
    objective = objective_of(algorithm, prepared.batches[0], logprobs(new), torch.zeros(40), list(range(20)))
    return prepared.metrics | {"kl_old": float(objective.metrics["kl_old"]) / 20}


@pytest.mark.parametrize("new", OTHERS)
def test_kl_old_is_the_divergence_of_the_new_policy_from_the_old(new: tuple[float, ...]) -> None:
    logged = whole_distribution({}, new, OLD)
    assert logged["kl_old"] == pytest.approx(divergence(OLD, new), rel=1e-9)
    assert logged["kl_reference"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("place", ["none", "loss", "reward"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("reference", OTHERS)
def test_kl_reference_is_the_divergence_from_the_reference(place: str, estimator: str, reference: tuple[float, ...]) -> None:
    """Whatever estimator the penalty has, and whatever is left out of the loss."""
    kl = {"place": place, "estimator": estimator, "coefficient": 0.1}
    logged = whole_distribution({"kl": kl, "mask_truncated": True}, (5, 5, 5, 5), reference)
    assert logged["kl_reference"] == pytest.approx(divergence(OLD, reference), rel=1e-9)
