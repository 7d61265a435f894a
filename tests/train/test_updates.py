"""Optimizer steps: schedule, clipping, non-finite gradients; bfloat16; two roles in two layouts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.config.schema import Config
from megarl.errors import TrainingError
from megarl.loop.parity import synthetic_batch
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, Reference, is_main_rank
from megarl.types import TrainBatch
from tiny import PROMPTS, tiny_config, write_tiny_model


def supervised(config: Config) -> TrainBatch:
    packed = synthetic_batch(PROMPTS, config)
    return build_supervised_batch(packed)


def parameters(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in policy.engine.chunks for parameter in chunk.parameters()]


def skip_non_finite(config: Config, value: float) -> None:
    policy = Policy(config, total_updates=10)
    batch = supervised(config)
    poisoned = replace(batch, token_weights=batch.token_weights * value)
    before = parameters(policy)
    result = policy.update(poisoned, supervised_objective)
    assert result.skipped and not math.isfinite(result.gradient_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))
    assert policy.optimizer.num_skipped == 1
    assert not policy.update(batch, supervised_objective).skipped
    assert policy.optimizer.num_consecutive_skipped == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))
    for _ in range(2):
        policy.update(poisoned, supervised_objective)
    policy.update(poisoned, supervised_objective)


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}, {"distributed_optimizer": False}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_are_skipped_counted_and_end_the_run(tmp_path: Path, parallel: dict[str, Any], value: float) -> None:
    write_tiny_model(tmp_path, "llama")
    config = tiny_config(tmp_path, policy={"parallel": parallel}, optimizer={"max_skipped_steps": 2})
    with pytest.raises(TrainingError, match=r"3 consecutive steps, more than optimizer.max_skipped_steps 2; lower"):
        run_local_ranks(skip_non_finite, (config, value), 2, 60)


def record_steps(config: Config, output: Path) -> None:
    policy = Policy(config, total_updates=10)
    batch = supervised(config)
    before = parameters(policy)
    results = [policy.update(batch, supervised_objective) for _ in range(10)]
    moved = max(float((a - b).abs().max()) for a, b in zip(before, parameters(policy), strict=True))
    if is_main_rank():
        torch.save(([result.learning_rate for result in results], [result.metrics["loss"] for result in results], moved), output)


def test_schedule_is_linear_warm_up_then_cosine_to_the_minimum(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    optimizer = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 4}
    run_local_ranks(record_steps, (tiny_config(tmp_path, optimizer=optimizer), tmp_path / "out.pt"), 1, 60)
    rates, losses, _ = torch.load(tmp_path / "out.pt")
    expected = [1e-2 * step / 4 for step in range(1, 5)]
    expected += [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(1, 7)]
    assert rates == pytest.approx(expected)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2, "vpp": 2}, {"cp": 2}])
def test_bfloat16_trains_near_float32(tmp_path: Path, parallel: dict[str, Any]) -> None:
    write_tiny_model(tmp_path, "qwen3")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = {"path": str(tmp_path), "dtype": dtype}
        config = tiny_config(tmp_path, model=model, policy={"parallel": parallel}, optimizer={"learning_rate": 1e-3})
        run_local_ranks(record_steps, (config, tmp_path / "out.pt"), 2, 60)
        _, losses[dtype], moved = torch.load(tmp_path / "out.pt")
        assert moved > 0
    for exact, rounded in zip(losses["float32"], losses["bfloat16"], strict=True):
        assert rounded == pytest.approx(exact, rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]


def compare_roles(config: Config) -> None:
    policy, reference = Policy(config, total_updates=1), Reference(config)
    packed = synthetic_batch(PROMPTS, config)
    ours, entropies = policy.engine.score(packed)
    theirs, _ = reference.engine.score(packed)
    assert ours[packed.loss_mask].abs().min() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    before = ours
    policy.update(supervised(config), supervised_objective)
    assert (policy.engine.score(packed)[0] - before).abs().max() > 1e-3, "the policy learns"
    assert torch.equal(reference.engine.score(packed)[0], theirs), "the reference does not"
    assert entropies.min() >= 0 and dist.get_world_size() == 4


@pytest.mark.parametrize(
    ("policy", "reference"),
    [({"tp": 2, "pp": 2}, {}), ({"cp": 2}, {"tp": 4, "sequence_parallel": True}), ({"pp": 2, "vpp": 2}, {"tp": 2, "cp": 2})],
)
def test_policy_and_reference_in_layouts_of_their_own(tmp_path: Path, policy: dict[str, Any], reference: dict[str, Any]) -> None:
    write_tiny_model(tmp_path, "qwen2")
    optimizer = {"learning_rate": 1e-2}
    config = tiny_config(tmp_path, policy={"parallel": policy}, reference={"parallel": reference}, optimizer=optimizer)
    run_local_ranks(compare_roles, (config,), 4, 60)


def clip_gradients(config: Config, output: Path) -> None:
    policy = Policy(config, total_updates=10)
    result = policy.update(supervised(config), supervised_objective)
    moments = [
        state["exp_avg"]
        for optimizer in policy.optimizer.megatron.chained_optimizers
        for state in optimizer.optimizer.state.values()
    ]
    # Adam's first moment after one step is (1 - beta1) times the clipped gradient
    squares = torch.stack([moment.double().square().sum() for moment in moments]).sum()
    torch.save((result.gradient_norm, float(squares.sqrt()) / (1 - config.optimizer.beta1)), output)


@pytest.mark.parametrize(("limit", "is_clipped"), [(0.05, True), (1e9, False), (0.0, False)])
def test_clipping_scales_the_global_norm(tmp_path: Path, limit: float, is_clipped: bool) -> None:
    write_tiny_model(tmp_path, "llama")
    run_local_ranks(clip_gradients, (tiny_config(tmp_path, optimizer={"clip_gradient": limit}), tmp_path / "out.pt"), 1, 60)
    norm, applied = torch.load(tmp_path / "out.pt")
    assert applied == pytest.approx(limit if is_clipped else norm, rel=1e-3)
    assert norm > 0.05
