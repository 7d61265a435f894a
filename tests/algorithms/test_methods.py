"""Every preset and many mixes against loops over Python floats: value and gradient, in any micro-batches."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.batches import slice_sequences
from megarl.config.schema import AlgorithmConfig
from megarl.data.packing import no_routing
from megarl.types import TokenOutputs
from methods import RUNNABLE, Reference, objective_of
from ragged import LONGEST, SEQUENCES, Ragged, ragged

MIXES: dict[str, dict[str, Any]] = {
    "dual_clip": {"preset": "grpo", "clip": {"dual": 1.3}},
    "kl_k1_in_loss": {"kl": {"place": "loss", "estimator": "k1", "coefficient": 0.3}},
    "entropy_bonus": {"entropy_coefficient": 0.2, "aggregation": "token_mean"},
    "tis_token": {"preset": "dapo", "sampler_correction": {"method": "tis", "cap": 1.2}},
    "tis_sequence": {"preset": "gspo", "sampler_correction": {"method": "tis", "level": "sequence", "cap": 1.1}},
    "mis_token": {"preset": "cispo", "sampler_correction": {"method": "mis", "cap": 1.2}},
    "mis_sequence": {"preset": "gmpo", "sampler_correction": {"method": "mis", "level": "sequence", "cap": 1.1}},
    "kimi_tis": RUNNABLE["kimi_k1_5"] | {"mirror_descent_tau": 2.0, "sampler_correction": {"method": "tis", "cap": 1.2}},
    "kimi_mis": RUNNABLE["kimi_k1_5"] | {"mirror_descent_tau": 2.0, "sampler_correction": {"method": "mis", "cap": 1.2}},
    "gmpo_tis": {"preset": "gmpo", "sampler_correction": {"method": "tis", "cap": 1.1}},
    "gspo_mis": {"preset": "gspo", "clip": {"low": 0.2, "high": 0.2}, "sampler_correction": {"method": "mis", "cap": 1.1}},
    "gspo_token_tis": {
        "preset": "gspo_token",
        "clip": {"low": 0.2, "high": 0.2},
        "sampler_correction": {"method": "tis", "cap": 1.1},
    },
    "cispo_sequence_mis": {"preset": "cispo", "ratio": "sequence", "sampler_correction": {"method": "mis", "cap": 1.1}},
    "rloo_tis": {"preset": "rloo", "sampler_correction": {"method": "tis", "cap": 1.2}},
    "gspo_wide": {"preset": "gspo", "clip": {"low": 0.1, "high": 0.1}},
    "gspo_token_wide": {"preset": "gspo_token", "clip": {"low": 0.1, "high": 0.1}},
    "gspo_token_reward_to_go": {
        "preset": "gspo_token",
        "clip": {"low": 0.1, "high": 0.1},
        "advantage": "reward_to_go_batch_mean",
        "kl": {"place": "reward", "estimator": "k1", "coefficient": 0.5},
    },
    "cispo_sequence": {"preset": "cispo", "ratio": "sequence", "clip": {"low": 0.05, "high": 0.05}},
    "cispo_tight": {"preset": "cispo", "clip": {"low": 0.1, "high": 0.1}},
    "gmpo_tight": {"preset": "gmpo", "clip": {"low": 0.1, "high": 0.15}},
    "remax_overlong": {"preset": "remax", "reward_shaping": {"overlong_buffer": 0.5}},
    "remax_clipped": {
        "advantage": "greedy_baseline",
        "ratio": "sequence",
        "clip": {"low": 0.1, "high": 0.1},
        "whiten": True,
        "mask_truncated": True,
    },
    "batch_mean_std": {"preset": "dr_grpo", "advantage": "batch_mean_std"},
    "process_rewards": {"preset": "dr_grpo", "advantage": "process_rewards"},
    "gspo_token_process_rewards": {"preset": "gspo_token", "advantage": "process_rewards", "mask_truncated": True, "whiten": True},
    "task_std": {"advantage": "group_mean_task_std", "kl": {"place": "reward", "estimator": "k1", "coefficient": 0.5}},
    "kimi_strong": {"preset": "kimi_k1_5", "mirror_descent_tau": 2.0, "reward_shaping": {"length_start": 0, "length_weight": 1.0}},
}
CASES = RUNNABLE | MIXES
MICRO_BATCHES = ([list(range(len(SEQUENCES)))], [[0, 3, 9], [1], [2, 4, 5, 6], [7, 8]], [[i] for i in range(len(SEQUENCES))])


def compute(
    batch: Ragged, config: AlgorithmConfig, logprobs: torch.Tensor, entropies: torch.Tensor, parts: list[list[int]]
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and its gradients by summing the micro-batches, as the engine does."""
    algorithm = Algorithm(config, LONGEST)
    (train_batch,) = algorithm.prepare(batch.packed, batch.outputs, step=0).batches
    logprobs, entropies = logprobs.clone().requires_grad_(), entropies.clone().requires_grad_()
    losses = [objective_of(algorithm, train_batch, logprobs, entropies, part).loss for part in parts]
    total = torch.stack(losses).sum()
    total.backward()
    assert logprobs.grad is not None
    return float(total.detach()), logprobs.grad, torch.zeros_like(entropies) if entropies.grad is None else entropies.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    config = AlgorithmConfig.model_validate(CASES[name])
    # token weights are float32: 6e-8 relative
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    for seed in range(3):
        batch = ragged(seed, dtype)
        generator = torch.Generator().manual_seed(seed + 100)
        noise = 0.3 * torch.randn(batch.outputs.old.shape, generator=generator, dtype=torch.float64)
        logprobs = (batch.outputs.old.double() + noise).to(dtype)
        reference = Reference(batch, config, masks_negative=name == "aepo")
        values, entropies = logprobs.double().tolist(), batch.outputs.entropies.double().tolist()
        expected = reference.loss(values, values, entropies)
        expected_gradient = torch.tensor(reference.gradient(values, entropies), dtype=torch.float64)
        for parts in MICRO_BATCHES:
            loss, gradient, entropy_gradient = compute(batch, config, logprobs, batch.outputs.entropies, parts)
            assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)
            assert bool(entropy_gradient.any()) == (config.entropy_coefficient > 0)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("cispo", "gspo_token", "mis_token"))])
def test_numeric_gradient(name: str) -> None:
    """For every loss without a stop-gradient, whose numeric derivative is another by intent."""
    config = AlgorithmConfig.model_validate(CASES[name])
    batch = ragged(1)
    algorithm = Algorithm(config, LONGEST)
    (train_batch,) = algorithm.prepare(batch.packed, batch.outputs, step=0).batches
    logprobs = batch.outputs.old + 0.2 * torch.randn(
        batch.outputs.old.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    everything = list(range(len(SEQUENCES)))
    assert torch.autograd.gradcheck(
        lambda x, e: objective_of(algorithm, train_batch, x, e, everything).loss,
        (logprobs.requires_grad_(), batch.outputs.entropies.clone().requires_grad_()),
    )


@pytest.mark.parametrize("cap", [1.05, 1e9])
@pytest.mark.parametrize("method", ["tis", "mis"])
@pytest.mark.parametrize("name", ["kimi_k1_5", "gmpo", "gspo"])
def test_a_correction_of_a_whole_response_weighs_its_loss(name: str, method: str, cap: float) -> None:
    """The gradient over a response is its weight times the gradient without a correction, the same factor for all its tokens."""
    batch = ragged(8)
    settings = RUNNABLE[name] | {"clip": {"low": 0.9, "high": 9.0}, "mirror_descent_tau": 2.0}
    plain = gradient_of(settings, batch, 0.3)
    corrected = gradient_of(settings | {"sampler_correction": {"method": method, "cap": cap}}, batch, 0.3)
    for positions in batch.trained:
        log_ratio = sum(float(batch.outputs.old[p] - batch.packed.sampler_logprobs[p]) for p in positions)
        weight = {"tis": min(math.exp(log_ratio), cap), "mis": math.exp(log_ratio) if math.exp(log_ratio) <= cap else 0.0}[method]
        for p in positions:
            assert float(corrected[p]) == pytest.approx(weight * float(plain[p]), rel=1e-5, abs=1e-9)
    assert plain.any()


def kimi_example(sampler: list[float], correction: dict[str, Any]) -> tuple[float, list[float]]:
    """Loss and gradient of mirror descent for one response of two tokens: A = 0, τ = 2, log-ratio (0.3, -0.4)."""
    old = torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64)
    packed = replace(
        slice_sequences(ragged(0).packed, 0, 1),
        token_ids=torch.arange(3),
        cu_seqlens=torch.tensor([0, 3]),
        loss_mask=torch.tensor([False, True, True]),
        sampler_logprobs=torch.tensor([0.0, *sampler], dtype=torch.float64),
        weight_versions=torch.zeros(3, dtype=torch.int64),
        step_rewards=torch.full((3,), torch.nan),
        rewards=torch.zeros(1, dtype=torch.float64),
        routed_experts=no_routing(3),
    )
    batch = Ragged(packed=packed, outputs=TokenOutputs(old=old, entropies=0 * old, reference=None, values=None), trained=[[1, 2]])
    config = AlgorithmConfig.model_validate(
        {"preset": "kimi_k1_5", "mirror_descent_tau": 2.0, "sampler_correction": correction, "reward_shaping": {"length_weight": 0}}
    )
    moved = old + torch.tensor([0.0, 0.3, -0.4], dtype=torch.float64)
    loss, gradient, _ = compute(batch, config, moved, batch.outputs.entropies, [[0]])
    return loss, gradient[1:].tolist()


def test_mirror_descent_points_at_the_old_policy_whatever_the_weights() -> None:
    """The numbers of 2501.12599, equation 3: loss τ/2 Δ² and gradient τ Δ at each token, Δ = -0.1, times the response's weight."""
    assert kimi_example([-1.0, -1.0], {}) == (pytest.approx(0.010, abs=1e-8), pytest.approx([-0.20, -0.20]))
    ratios = [1.9, 0.1]
    sampler = [-1.0 - math.log(ratio) for ratio in ratios]
    for correction, weight in (
        ({"method": "tis"}, 0.19),
        ({"method": "tis", "cap": 0.1}, 0.1),
        ({"method": "mis"}, 0.19),
        ({"method": "mis", "cap": 0.15}, 0.0),
    ):
        loss, gradient = kimi_example(sampler, correction)
        assert loss == pytest.approx(0.010 * weight, rel=1e-6, abs=1e-12)
        assert gradient == pytest.approx([-0.20 * weight, -0.20 * weight], rel=1e-6, abs=1e-12)


def gradient_of(settings: dict[str, Any], batch: Ragged, noise: float) -> torch.Tensor:
    logprobs = batch.outputs.old + noise * torch.randn(
        batch.outputs.old.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    return compute(batch, AlgorithmConfig.model_validate(settings), logprobs, batch.outputs.entropies, MICRO_BATCHES[1])[1]


def test_dapo_with_equal_clips_and_no_shaping_is_token_mean_grpo() -> None:
    plain = {"clip": {"low": 0.2, "high": 0.2}, "reward_shaping": {"overlong_buffer": 0.0}, "mask_truncated": False}
    grpo = {"preset": "grpo", "aggregation": "token_mean", "kl": {"place": "none", "coefficient": 0.0}}
    batch = ragged(2)
    assert torch.equal(gradient_of({"preset": "dapo"} | plain, batch, 0.3), gradient_of(grpo, batch, 0.3))
    assert not torch.equal(gradient_of({"preset": "dapo"}, batch, 0.3), gradient_of(grpo, batch, 0.3))


@pytest.mark.parametrize("surrogate", ["ppo_clip", "cispo", "gmpo"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_at_ratio_one_every_clipped_surrogate_is_the_policy_gradient(surrogate: str, aggregation: str) -> None:
    batch = ragged(3)
    clipped = gradient_of({"surrogate": surrogate, "aggregation": aggregation}, batch, 0.0)
    plain = gradient_of({"surrogate": "policy_gradient", "aggregation": aggregation}, batch, 0.0)
    torch.testing.assert_close(clipped, plain)


def test_unclipped_cispo_is_the_unclipped_surrogate() -> None:
    batch = ragged(4)
    unclipped = {"clip": {"low": 1.0, "high": 1e9}}
    ours = gradient_of({"surrogate": "cispo"} | unclipped, batch, 0.5)
    torch.testing.assert_close(ours, gradient_of({"surrogate": "ppo_clip"} | unclipped, batch, 0.5))


def test_unclipped_gmpo_is_unclipped_gspo() -> None:
    """The geometric mean of all token ratios is GSPO's ratio."""
    batch = ragged(4)
    gspo = {"surrogate": "ppo_clip", "ratio": "sequence", "clip": {"low": 1.0, "high": 1e9}}
    gmpo = {"surrogate": "gmpo", "clip": {"low": 1.0, "high": 1e9}}
    torch.testing.assert_close(gradient_of(gmpo, batch, 0.05), gradient_of(gspo, batch, 0.05))


def test_gspo_is_grpo_for_responses_of_one_token() -> None:
    batch = ragged(5)
    first = torch.zeros_like(batch.packed.loss_mask)
    for positions in batch.trained:
        first[positions[:1]] = True
    batch.packed.loss_mask.copy_(first)
    clip = {"clip": {"low": 0.2, "high": 0.2}}
    grpo = gradient_of({"ratio": "token"} | clip, batch, 0.3)
    assert grpo.any()
    for ratio in ("sequence", "sequence_token"):
        torch.testing.assert_close(gradient_of({"ratio": ratio} | clip, batch, 0.3), grpo)


def test_gspo_token_has_gspos_value_and_for_equal_advantages_its_gradient() -> None:
    batch = ragged(6)
    clip = {"clip": {"low": 1.0, "high": 1e9}}
    torch.testing.assert_close(
        gradient_of({"preset": "gspo_token"} | clip, batch, 0.3), gradient_of({"preset": "gspo"} | clip, batch, 0.3)
    )
