"""Each small function against loops over Python floats (64 bit) or worked numbers, and what an algorithm keeps between steps."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import references
from megarl.algorithms.advantages import ADVANTAGES
from megarl.algorithms.aggregation import AGGREGATIONS, token_weights
from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.kl import ESTIMATORS, adapted_coefficient, kl_estimate
from megarl.algorithms.off_policy import CORRECTIONS, sampler_weights
from megarl.algorithms.shaping import length_rewards, masks_negative, soft_overlong_penalties
from megarl.algorithms.surrogates import RATIOS, SURROGATES
from megarl.algorithms.values import clipped_value_loss, explained_variance
from megarl.config.schema import AlgorithmConfig
from megarl.errors import ConfigError, TrainingError
from megarl.types import TrainBatch
from methods import objective_of
from ragged import GREEDY_LENGTHS, GROUPS, LONGEST, SEQUENCES, ragged

ALL = list(range(len(SEQUENCES)))


def test_the_schema_offers_what_the_registries_have() -> None:
    properties = AlgorithmConfig.model_json_schema()
    fields = AlgorithmConfig.model_fields

    def choices(name: str) -> set[str]:
        return set(fields[name].metadata[0].choices)

    definitions = properties["$defs"]
    assert choices("advantage") == set(ADVANTAGES)
    assert choices("surrogate") == set(SURROGATES)
    assert set(properties["properties"]["ratio"]["enum"]) == set(RATIOS)
    assert set(properties["properties"]["aggregation"]["enum"]) == set(AGGREGATIONS)
    assert set(definitions["KLConfig"]["properties"]["estimator"]["enum"]) == set(ESTIMATORS)
    assert set(definitions["SamplerCorrectionConfig"]["properties"]["method"]["enum"]) == set(CORRECTIONS) | {"none"}


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_aggregation(aggregation: str) -> None:
    batch = ragged(1)
    terms = torch.randn(batch.packed.loss_mask.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = token_weights(batch.packed.loss_mask, batch.packed.cu_seqlens, aggregation, LONGEST).double()
    expected = references.aggregated(aggregation, [[float(terms[p]) for p in one] for one in batch.trained], LONGEST)
    assert float((weights * terms).sum()) == pytest.approx(expected, rel=1e-6)
    assert not weights[~batch.packed.loss_mask].any()


def test_kl_estimators() -> None:
    rng = random.Random(0)
    for _ in range(50):
        logp, reference = rng.uniform(-5, 0), rng.uniform(-5, 0)
        pair = torch.tensor([logp], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
        for estimator in ESTIMATORS:
            assert kl_estimate(*pair, estimator).item() == pytest.approx(references.kl(logp, reference, estimator))


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]
)
def test_adapted_coefficient(kl: float, factor: float) -> None:
    assert adapted_coefficient(0.5, kl, target=6.0, rate=0.1) == pytest.approx(0.5 * factor)


@pytest.mark.parametrize("method", ["tis", "mis"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampler_weights(method: str, level: str, dtype: torch.dtype) -> None:
    batch = ragged(3, dtype)
    packed, old = batch.packed, batch.outputs.old
    weights = sampler_weights(
        old, packed.sampler_logprobs, packed.cu_seqlens, packed.loss_mask, method=method, level=level, cap=1.2
    )
    expected = [0.0] * old.numel()
    for positions in batch.trained:
        trainer, sampler = ([float(values[p]) for p in positions] for values in (old, packed.sampler_logprobs))
        if positions:
            for p, weight in zip(positions, references.sampler_weight(trainer, sampler, method, level, 1.2), strict=True):
                expected[p] = weight
    assert weights.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert sum(weight == pytest.approx(1.2 if method == "tis" else 0.0) for weight in weights[packed.loss_mask].tolist()) > 0


def test_soft_overlong_punishment() -> None:
    """DAPO's own numbers: 20,480 tokens at most, of which 4,096 are the buffer."""
    lengths = [0, 1, 16384, 16385, 18432, 20480, 20481, 30000]
    actual = soft_overlong_penalties(torch.tensor(lengths), 20480, 4096).tolist()
    assert actual == pytest.approx([references.soft_overlong(length, 20480, 4096) for length in lengths])
    assert actual[4] == pytest.approx(-0.5) and actual[2] == 0.0 and actual[-1] == -1.0


def test_kimi_length_reward() -> None:
    rng = random.Random(1)
    for _ in range(20):
        lengths = [rng.choice([0, 3, 7, 100, 101]) for _ in GROUPS]
        correct = [rng.random() < 0.5 for _ in GROUPS]
        actual = length_rewards(torch.tensor(lengths), torch.tensor(correct), torch.tensor(GROUPS)).tolist()
        expected = [references.kimi_length_reward(i, lengths, correct, GROUPS) for i in range(len(GROUPS))]
        assert actual == pytest.approx(expected, abs=1e-6)


def test_entropy_control_has_hysteresis() -> None:
    masking, answers = False, []
    for entropy in (0.3, 0.5, 0.51, 0.4, 0.2, 0.19, 0.3, 0.6):
        masking = masks_negative(entropy, masking, low=0.2, high=0.5)
        answers.append(masking)
    assert answers == [False, False, True, True, True, False, False, True]


def test_value_loss_and_explained_variance() -> None:
    generator = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    loss = clipped_value_loss(values, old, returns, 0.2)
    for i in range(40):
        v, v_old, target = float(values[i]), float(old[i]), float(returns[i])
        bounded = min(max(v, v_old - 0.2), v_old + 0.2)
        assert float(loss[i]) == pytest.approx(0.5 * max((v - target) ** 2, (bounded - target) ** 2))
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, 0.2), (values.clone().requires_grad_(),))
    center = sum(returns.tolist()) / 40
    residuals = [float(returns[i]) - float(values[i]) for i in range(40)]
    unexplained = sum((x - sum(residuals) / 40) ** 2 for x in residuals) / sum((x - center) ** 2 for x in returns.tolist())
    assert float(explained_variance(values, returns)) == pytest.approx(1 - unexplained)
    assert float(explained_variance(returns, returns)) == 1.0
    assert float(explained_variance(values, torch.ones(40))) == 0.0


def advantages_of(batch: TrainBatch) -> torch.Tensor:
    assert batch.sampled is not None
    return batch.sampled.advantages


def algorithm_of(**settings: Any) -> Algorithm:
    return Algorithm(AlgorithmConfig.model_validate(settings), LONGEST)


def test_mini_batches_have_their_own_normaliser_and_share_the_advantages() -> None:
    batch = ragged(5)
    choices = {"aggregation": "token_mean", "sampler_correction": {"method": "tis"}}
    (whole,) = algorithm_of(**choices).prepare(batch.packed, batch.outputs, 0).batches
    parts = algorithm_of(**choices, updates_per_step=5).prepare(batch.packed, batch.outputs, 0).batches
    assert [part.packed.num_sequences for part in parts] == [2] * 5
    for name in ("advantages", "sampler_weights"):
        assert torch.equal(torch.cat([getattr(part.sampled, name) for part in parts]), getattr(whole.sampled, name))
    for name in ("truncated", "greedy_rewards", "greedy_lengths"):
        assert torch.equal(torch.stack([getattr(part.packed, name) for part in parts]), getattr(batch.packed, name).view(5, 2))
    assert torch.equal(torch.cat([part.sampled.old_logprobs for part in parts if part.sampled]), batch.outputs.old)
    assert torch.equal(torch.cat([part.reference_logprobs for part in parts]), batch.outputs.reference)
    for part in parts:
        trained = int(part.packed.loss_mask.sum())
        assert part.token_weights.sum().item() == pytest.approx(1.0 if trained else 0.0)


def test_clip_fractions() -> None:
    batch = ragged(6)
    algorithm = algorithm_of(clip={"low": 0.1, "high": 0.3})
    prepared = algorithm.prepare(batch.packed, batch.outputs, 0).batches[0]
    logprobs = batch.outputs.old + 0.4 * torch.randn(batch.outputs.old.shape, generator=torch.Generator().manual_seed(0))
    sums = objective_of(algorithm, prepared, logprobs, batch.outputs.entropies, ALL).metrics
    advantages = advantages_of(prepared)
    low = high = 0
    for p in (p for one in batch.trained for p in one):
        ratio = math.exp(float(logprobs[p]) - float(batch.outputs.old[p]))
        low += ratio < 0.9 and float(advantages[p]) < 0
        high += ratio > 1.3 and float(advantages[p]) > 0
    assert low > 0 and high > 0
    assert float(sums["clip_fraction_low"]) == low and float(sums["clip_fraction_high"]) == high


def test_length_reward_is_by_what_the_batch_says_of_correctness() -> None:
    """Rewards of other scorers make a wrong answer no right one, and a low weight a right answer no wrong one."""
    batch = ragged(7)
    correct = torch.tensor([True, False, False, True, False, True, False, True, False, False])
    settings = {"preset": "kimi_k1_5", "reward_shaping": {"length_start": 0, "length_weight": 1.0}}
    told = algorithm_of(**settings).prepare(replace(batch.packed, correct=correct), batch.outputs, 0)
    lengths = [len(one) for one in batch.trained]
    bonus = [references.kimi_length_reward(i, lengths, correct.tolist(), GROUPS) for i in ALL]
    assert told.metrics["length_reward_mean"] == pytest.approx(sum(bonus) / len(bonus))
    opposite = algorithm_of(**settings).prepare(replace(batch.packed, correct=~correct), batch.outputs, 0)
    assert opposite.metrics["length_reward_mean"] != pytest.approx(sum(bonus) / len(bonus))


def test_length_reward_waits_for_its_first_step() -> None:
    batch = ragged(7)
    algorithm = algorithm_of(preset="kimi_k1_5", reward_shaping={"length_start": 3})
    early, late = (algorithm.prepare(batch.packed, batch.outputs, step) for step in (2, 3))
    plain = algorithm_of(advantage="group_mean").prepare(batch.packed, batch.outputs, 2)
    assert torch.equal(advantages_of(early.batches[0]), advantages_of(plain.batches[0]))
    assert not torch.equal(advantages_of(late.batches[0]), advantages_of(plain.batches[0]))
    assert "length_reward_mean" in late.metrics and "length_reward_mean" not in early.metrics


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_adaptive_kl_follows_the_measured_kl_and_is_restored(place: str) -> None:
    batch = ragged(8)
    kl = {"place": place, "estimator": "k1", "coefficient": 0.2, "target": 0.01}
    algorithm = algorithm_of(kl=kl)
    responses = [sum(float(batch.outputs.old[p] - batch.outputs.reference[p]) for p in one) for one in batch.trained]
    error = min(max((sum(responses) / len(responses) - 0.01) / 0.01, -0.2), 0.2)
    assert algorithm.prepare(batch.packed, batch.outputs, 0).metrics["kl_coefficient"] == 0.2
    algorithm.finish_step(batch.packed, batch.outputs)
    assert algorithm.kl_coefficient == pytest.approx(0.2 * (1 + 0.1 * error)) != 0.2
    restored = algorithm_of(kl=kl)
    restored.restore(algorithm.state())
    assert restored.kl_coefficient == algorithm.kl_coefficient
    fixed = algorithm_of(kl=kl | {"target": None, "coefficient": 0.7})
    fixed.restore(algorithm.state())
    assert fixed.kl_coefficient == 0.7, "a coefficient changed in the config of a resumed run counts"
    fixed.finish_step(batch.packed, batch.outputs)
    assert fixed.kl_coefficient == 0.7


def test_entropy_control_takes_negatives_out_and_is_restored() -> None:
    batch = ragged(9)
    settings = {"preset": "aepo", "entropy_control": {"low": 0.1, "high": 0.2}}
    algorithm = algorithm_of(**settings)
    plain = (
        algorithm_of(advantage="group_mean_task_std", aggregation="token_mean").prepare(batch.packed, batch.outputs, 0).batches[0]
    )
    masked = algorithm.prepare(batch.packed, batch.outputs, 0)
    assert masked.metrics["negatives_masked"] == 1.0 and (advantages_of(plain) < 0).any()
    assert torch.equal(advantages_of(masked.batches[0]), advantages_of(plain).clamp(min=0))
    assert torch.equal(masked.batches[0].token_weights, plain.token_weights)
    restored = algorithm_of(**settings)
    restored.restore(algorithm.state())
    between = replace(batch.outputs, entropies=torch.full_like(batch.outputs.entropies, 0.15))
    assert restored.prepare(batch.packed, between, 0).metrics["negatives_masked"] == 1.0
    assert algorithm_of(**settings).prepare(batch.packed, between, 0).metrics["negatives_masked"] == 0.0


def test_truncated_responses_leave_the_loss_but_not_the_group() -> None:
    batch = ragged(10)
    kept = algorithm_of().prepare(batch.packed, batch.outputs, 0).batches[0]
    masked = algorithm_of(mask_truncated=True).prepare(batch.packed, batch.outputs, 0).batches[0]
    cut = {p for i, one in enumerate(batch.trained) if batch.packed.truncated[i] for p in one}
    assert cut
    for p in range(advantages_of(kept).numel()):
        assert float(advantages_of(masked)[p]) == (0.0 if p in cut else float(advantages_of(kept)[p]))
        assert (float(masked.token_weights[p]) == 0.0) == (p in cut or not batch.packed.loss_mask[p])


def test_functions_of_the_users_own() -> None:
    batch = ragged(11)
    algorithm = algorithm_of(advantage="own_functions:batch_median", surrogate="own_functions:unclipped")
    prepared = algorithm.prepare(batch.packed, batch.outputs, 0).batches[0]
    rewards = batch.packed.rewards
    expected = (rewards - rewards.median()).repeat_interleave(batch.packed.sequence_lengths) * batch.packed.loss_mask
    torch.testing.assert_close(advantages_of(prepared), expected)
    loss = objective_of(algorithm, prepared, batch.outputs.old, batch.outputs.entropies, ALL).loss
    assert float(loss) == pytest.approx(-float((expected * prepared.token_weights).sum()))


def test_an_advantage_of_the_users_own_reads_the_greedy_rewards() -> None:
    batch = ragged(11)
    algorithm = algorithm_of(advantage="own_functions:BETTER_THAN_GREEDY", reward_shaping={"overlong_buffer": 0.5})
    assert algorithm.needs_greedy_response
    actual = advantages_of(algorithm.prepare(batch.packed, batch.outputs, 0).batches[0])
    for i, positions in enumerate(batch.trained):
        sampled, greedy = (
            float(rewards[i]) + references.soft_overlong(length, LONGEST, 0.5 * LONGEST)
            for rewards, length in (
                (batch.packed.rewards, len(positions)),
                (batch.packed.greedy_rewards, GREEDY_LENGTHS[GROUPS[i]]),
            )
        )
        assert all(float(actual[p]) == (1.0 if sampled > greedy else 0.0) for p in positions)
    assert 0 < float(actual.sum()) < sum(map(len, batch.trained))
    assert not algorithm_of(advantage="own_functions:batch_median").needs_greedy_response
    with pytest.raises(ConfigError, match=r"algorithm.reward_shaping.length_weight: is 0.1, .* set it to 0"):
        algorithm_of(advantage="own_functions:BETTER_THAN_GREEDY", reward_shaping={"length_weight": 0.1})


def test_greedy_rewards_that_nobody_asked_for_are_no_numbers() -> None:
    batch = ragged(11)
    packed = replace(batch.packed, greedy_rewards=torch.full_like(batch.packed.greedy_rewards, math.nan))
    with pytest.raises(TrainingError, match=r"algorithm.advantage greedy_baseline: gave .* finite numbers"):
        algorithm_of(advantage="greedy_baseline").prepare(packed, batch.outputs, 0)


def test_users_functions_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.advantage: cannot import own_functions:absent: AttributeError.*PYTHONPATH"):
        algorithm_of(advantage="own_functions:absent")
    with pytest.raises(ConfigError, match=r"algorithm.surrogate: cannot import no_such_module:f: ModuleNotFoundError"):
        algorithm_of(surrogate="no_such_module:f")
    with pytest.raises(ConfigError, match=r"algorithm.surrogate: own_functions:number is a int, not a function"):
        algorithm_of(surrogate="own_functions:number")
    batch = ragged(12)
    with pytest.raises(
        TrainingError, match=r"algorithm.advantage own_functions:infinite: gave a tensor of shape .* finite numbers"
    ):
        algorithm_of(advantage="own_functions:infinite").prepare(batch.packed, batch.outputs, 0)
    algorithm = algorithm_of(surrogate="own_functions:no_surrogate")
    prepared = algorithm.prepare(batch.packed, batch.outputs, 0).batches[0]
    with pytest.raises(TrainingError, match=r"algorithm.surrogate own_functions:no_surrogate: gave Tensor; return .*Surrogate"):
        objective_of(algorithm, prepared, batch.outputs.old, batch.outputs.entropies, ALL)
