"""Staleness of trained tokens, against a loop over them."""

import math
from dataclasses import replace

import pytest
import torch

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.off_policy import sampler_weights, staleness_metrics
from megarl.config.schema import AlgorithmConfig
from megarl.types import PackedBatch, TokenOutputs
from ragged import ragged

VERSION = 7
CAP = 1.5


def make_batch(seed: int) -> tuple[PackedBatch, TokenOutputs]:
    """Ragged responses whose tokens are 0 to 3 versions old, older ones first, with wide gaps to the trainer."""
    batch = ragged(seed, dtype=torch.float32)
    packed, outputs = batch.packed, batch.outputs
    generator = torch.Generator().manual_seed(seed)
    age = torch.randint(0, 4, packed.token_ids.shape, generator=generator)
    gap = torch.randn(packed.token_ids.shape, generator=generator) * (0.1 + age)
    versions = torch.where(packed.loss_mask, VERSION - age, -1)
    return replace(packed, weight_versions=versions, sampler_logprobs=(outputs.old + gap) * packed.loss_mask), outputs


@pytest.mark.parametrize("method", ["none", "tis", "mis"])
def test_histogram_and_gaps_are_those_of_a_loop(method: str) -> None:
    packed, outputs = make_batch(3)
    config = AlgorithmConfig.model_validate({"sampler_correction": {"method": method, "cap": CAP}, "updates_per_step": 1})
    prepared = Algorithm(config, max_new_tokens=16).prepare(packed, outputs, VERSION)
    metrics = staleness_metrics(prepared.batches, VERSION)

    ages, before, after = [], {k: [] for k in range(4)}, {k: [] for k in range(4)}
    for token in range(packed.token_ids.numel()):
        if not packed.loss_mask[token]:
            continue
        age = VERSION - int(packed.weight_versions[token])
        log_ratio = float(outputs.old[token]) - float(packed.sampler_logprobs[token])
        ratio = math.exp(log_ratio)
        weight = {"none": 1.0, "tis": min(ratio, CAP), "mis": ratio if ratio <= CAP else 0.0}[method]
        ages.append(age)
        before[age].append(abs(log_ratio))
        if weight > 0:
            after[age].append(abs(log_ratio - math.log(weight)))
    assert metrics["staleness_mean"] == pytest.approx(sum(ages) / len(ages))
    assert metrics["staleness_max"] == max(ages) == 3
    for k in range(4):
        assert metrics[f"staleness/{k}_tokens"] == ages.count(k) > 0
        assert metrics[f"staleness/{k}_gap"] == pytest.approx(sum(before[k]) / len(before[k]), rel=1e-5)
        assert metrics[f"staleness/{k}_gap_corrected"] == pytest.approx(sum(after[k]) / len(after[k]), rel=1e-4, abs=1e-6)


def test_weights_are_token_by_token_whatever_version_sampled_them() -> None:
    """One response whose first half is two versions old: its weights are the products that each half has alone."""
    old, sampler = torch.tensor([-1.0, -2.0, -1.5, -0.5]), torch.tensor([-1.2, -1.0, -1.5, -0.75])
    weights = sampler_weights(
        old, sampler, torch.tensor([0, 4]), torch.ones(4, dtype=torch.bool), method="tis", level="token", cap=1.25
    )
    assert weights.tolist() == pytest.approx([math.exp(0.2), math.exp(-1.0), 1.0, 1.25])


@pytest.mark.parametrize("limit", [0, 2, 3])
def test_tokens_beyond_the_limit_are_left_out_and_counted(limit: int) -> None:
    packed, outputs = make_batch(4)
    config = AlgorithmConfig.model_validate({"sampler_correction": {"method": "tis", "max_staleness": limit}})
    prepared = Algorithm(config, max_new_tokens=16).prepare(packed, outputs, VERSION)
    (batch,) = prepared.batches
    is_stale = [bool(m) and VERSION - int(v) > limit for m, v in zip(packed.loss_mask, packed.weight_versions, strict=True)]
    assert prepared.metrics["stale_tokens_masked"] == sum(is_stale)
    kept = [bool(m) and not stale for m, stale in zip(packed.loss_mask, is_stale, strict=True)]
    assert batch.packed.loss_mask.tolist() == kept
    assert [weight > 0 for weight in batch.token_weights.tolist()] == kept
    assert "staleness_max" in (metrics := staleness_metrics(prepared.batches, VERSION)) and metrics["staleness_max"] <= limit


def test_nothing_is_said_of_a_step_without_tokens() -> None:
    packed, outputs = make_batch(5)
    packed = replace(packed, loss_mask=torch.zeros_like(packed.loss_mask))
    prepared = Algorithm(AlgorithmConfig(), max_new_tokens=16).prepare(packed, outputs, VERSION)
    assert staleness_metrics(prepared.batches, VERSION) == {}
