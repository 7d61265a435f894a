"""Optimizer steps: schedule, clipping, non-finite gradients; bfloat16; two roles in two layouts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import get_scheduler

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.algorithms.step_metrics import step_metrics
from megarl.cli.parity import synthetic_batch
from megarl.config.schema import Config
from megarl.errors import TrainingError
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, Reference, is_main_rank
from megarl.types import TokenOutputs, TrainBatch
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
    assert not policy.update(batch, supervised_objective).skipped  # a run that begins with such a loss ends at once
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


def test_schedule_is_linear_warm_up_then_cosine_towards_the_minimum(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    optimizer = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 4}
    run_local_ranks(record_steps, (tiny_config(tmp_path, optimizer=optimizer), tmp_path / "out.pt"), 1, 60)
    rates, losses, _ = torch.load(tmp_path / "out.pt")
    expected = [1e-2 * step / 4 for step in range(4)]
    expected += [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx(expected)
    assert losses[-1] < losses[0]


SCHEDULES = [  # schedule, warm-up, updates, share of the peak at the end
    (schedule, warmup, updates, least)
    for schedule in ("constant", "linear", "cosine")
    for warmup, updates in ((0, 1), (0, 6), (1, 2), (2, 7), (5, 6), (4, 4))
    for least in (0.0, 0.1)
]


def record_rates(configs: list[Config], totals: list[int], output: Path) -> None:
    rates = []
    for config, total in zip(configs, totals, strict=True):
        optimizer = Policy(config, total_updates=total).optimizer
        rates.append([optimizer.pass_over()[1] for _ in range(total)])
    torch.save(rates, output)


def test_rates_are_transformers_own(tmp_path: Path) -> None:
    """The first update without a warm-up is made at the peak, and the last one learns."""
    write_tiny_model(tmp_path, "llama")
    configs = [
        tiny_config(
            tmp_path,
            optimizer={"learning_rate": 0.5, "min_learning_rate": 0.5 * least, "schedule": schedule, "warmup_steps": warmup},
        )
        for schedule, warmup, _, least in SCHEDULES
    ]
    totals = [updates for _, _, updates, _ in SCHEDULES]
    run_local_ranks(record_rates, (configs, totals, tmp_path / "out.pt"), 1, 120)
    for case, rates in zip(SCHEDULES, torch.load(tmp_path / "out.pt"), strict=True):
        schedule, warmup, updates, least = case
        theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        name = f"{schedule}_with_warmup" if schedule == "constant" else schedule
        scheduler = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=updates)
        expected = []
        for update in range(updates):
            share = scheduler.get_last_lr()[0]
            expected.append(0.5 * (share if update < warmup else least + (1 - least) * share))
            theirs.step()
            scheduler.step()
        if schedule == "constant":
            expected = [0.5 * min(1.0, update / max(warmup, 1)) if update < warmup else 0.5 for update in range(updates)]
        assert rates == pytest.approx(expected), case
        assert rates[-1] > 0, case


def learn_from_nothing(config: Config) -> None:
    policy = Policy(config, total_updates=10)
    batch = supervised(config)
    policy.update(batch, supervised_objective)  # so that there is momentum
    packed = batch.packed
    masked = replace(batch, packed=replace(packed, loss_mask=torch.zeros_like(packed.loss_mask)))
    weightless = replace(batch, token_weights=torch.zeros_like(batch.token_weights))
    before, moments = parameters(policy), adam_state(policy)
    for nothing in (masked, weightless):
        result = policy.update(nothing, supervised_objective)
        assert result.empty and not result.skipped and result.gradient_norm == 0
        assert ("entropy" in result.metrics) == (nothing is weightless)
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments, adam_state(policy), strict=True))
    result = policy.update(batch, supervised_objective)
    assert not result.empty and result.learning_rate == pytest.approx(config.optimizer.learning_rate * 7 / 10)
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))


def adam_state(policy: Policy) -> list[torch.Tensor]:
    return [
        value.detach().clone()
        for optimizer in policy.optimizer.megatron.chained_optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"distributed_optimizer": False}])
def test_an_update_without_a_trained_token_moves_nothing_and_takes_its_place_in_the_schedule(
    tmp_path: Path, parallel: dict[str, Any]
) -> None:
    write_tiny_model(tmp_path, "llama")
    optimizer = {"learning_rate": 1e-2, "schedule": "linear", "weight_decay": 0.1}
    run_local_ranks(learn_from_nothing, (tiny_config(tmp_path, policy={"parallel": parallel}, optimizer=optimizer),), 2, 60)


def watch_a_step(config: Config, output: Path) -> None:
    """Three updates of unequal numbers of tokens, the last of none, at a rate that moves nothing worth a rounding."""
    policy = Policy(config, total_updates=3)
    packed = synthetic_batch(PROMPTS[:3], config)
    kept = packed.group_ids.repeat_interleave(packed.sequence_lengths) < 2
    packed = replace(packed, loss_mask=packed.loss_mask & kept)
    logprobs, entropies = policy.engine.forward_only(packed)
    generator = torch.Generator().manual_seed(0)
    old = logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator) * packed.loss_mask
    scores = TokenOutputs(old=old, entropies=entropies, reference=None, values=None)
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    batches = algorithm.prepare(packed, scores, 0).batches
    results = [policy.update(batch, algorithm.objective) for batch in batches]
    if is_main_rank():
        tokens = [int(batch.packed.loss_mask.sum()) for batch in batches]
        torch.save((step_metrics([one for one in results if one]), tokens, packed.loss_mask, logprobs, old, entropies), output)


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"cp": 2}])
def test_metrics_of_a_step_are_those_of_its_tokens(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Means over all tokens of the step, not means of the updates' means; extremes over all, whatever the layout."""
    write_tiny_model(tmp_path, "llama")
    config = tiny_config(
        tmp_path,
        policy={"parallel": parallel, "max_tokens_per_micro_batch": 40},
        optimizer={"learning_rate": 1e-12, "weight_decay": 0.0},
        algorithm={"updates_per_step": 3},
    )
    run_local_ranks(watch_a_step, (config, tmp_path / "out.pt"), 2, 60)
    metrics, tokens, mask, logprobs, old, entropies = torch.load(tmp_path / "out.pt")
    assert tokens[0] != tokens[1] and tokens[2] == 0
    ratios = [math.exp(float(a) - float(b)) for a, b in zip(logprobs[mask], old[mask], strict=True)]
    expected = {
        "entropy": sum(entropies[mask].tolist()) / sum(tokens),
        "kl_old": sum(ratio - 1 - math.log(ratio) for ratio in ratios) / sum(tokens),
        "ratio_max": max(ratios),
        "ratio_min": min(ratios),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (metrics["empty_updates"], metrics["skipped_updates"]) == (1.0, 0.0)
    assert 0 < metrics["gradient_norm"] < metrics["gradient_norm_max"]


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
    ours, entropies = policy.engine.forward_only(packed)
    theirs, _ = reference.engine.forward_only(packed)
    assert ours[packed.loss_mask].abs().min() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    before = ours
    policy.update(supervised(config), supervised_objective)
    assert (policy.engine.forward_only(packed)[0] - before).abs().max() > 1e-3, "the policy learns"
    assert torch.equal(reference.engine.forward_only(packed)[0], theirs), "the reference does not"
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
