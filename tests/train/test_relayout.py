"""Policy and critic from one layout to another, on other ranks too: the same batch gives the same scores, loss and next step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithms.algorithm import Algorithm
from megarl.cli.parity import synthetic_batch
from megarl.config.schema import Config
from megarl.loop.models import move_learner
from megarl.parallel.launch import run_local_ranks
from megarl.train.learner import Learner, share_results
from megarl.train.roles import Critic, Policy, compute_outputs
from tiny import PROMPTS, tiny_config, write_tiny_model

RANKS = 4
LAYOUTS = [
    ({"parallel": {"tp": 2}}, {"parallel": {"cp": 2, "pp": 2}}),
    # onto two of the ranks, which are not the first, and away from two
    ({"parallel": {"pp": 2}}, {"first_rank": 2, "parallel": {"cp": 2}}),
    ({"first_rank": 1, "num_ranks": 2, "parallel": {"tp": 2}, "offload": "all"}, {"parallel": {"cp": 4}}),
    # one and the other disjoint
    ({"num_ranks": 2, "parallel": {"tp": 2, "distributed_optimizer": False}}, {"first_rank": 2, "parallel": {"pp": 2, "vpp": 2}}),
]


def tensors(learner: Learner) -> dict[str, Tensor]:
    """The weights, on rank 0."""
    return {name: tensor.clone() for name, tensor in learner.hugging_face_tensors()}


def gap(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference of two updates of ``start``, relative to the update, beyond the rounding of the weights they are in."""

    def of(name: str) -> float:
        rounding = torch.finfo(start[name].dtype).eps * start[name].norm()
        change = (one[name] - start[name]).norm() + rounding
        return float(((one[name] - other[name]).norm() - rounding).clamp_min(0) / change)

    return max(map(of, one), default=0.0)


def move_and_compare(first: Config, second: Config, output: Path) -> None:
    packed = synthetic_batch(PROMPTS, first)
    algorithm = Algorithm(first.algorithm, first.rollout.max_new_tokens)
    policy, critic = Policy(first, total_updates=6), Critic(first, total_updates=6)
    objectives = (algorithm.objective, algorithm.value_objective)

    def step(learners: tuple[Learner, ...]) -> list[dict[str, float]]:
        """One update of each; what all ranks see of it."""
        scores = compute_outputs(learners[0], None, learners[1], packed)
        batches = algorithm.prepare(packed, scores, step=0).batches
        metrics = []
        for learner, objective in zip(learners, objectives, strict=True):
            (result,) = share_results(learner, [learner.update(batch, objective) for batch in batches])
            metrics.append(dict(result.metrics) | {"norm": result.gradient_norm, "rate": result.learning_rate})
        return metrics

    learners: tuple[Learner, ...] = (policy, critic)
    for _ in range(2):
        step(learners)
    moved: tuple[Learner, ...] = (
        Policy(second, total_updates=6, with_weights=False),
        Critic(second, total_updates=6, with_weights=False),
    )
    with torch.no_grad():
        for learner in moved:
            with learner.on_device():
                for chunk in learner.engine.chunks:
                    for parameter in chunk.parameters():
                        parameter.data.fill_(float("nan"))
    for learner, to in zip(learners, moved, strict=True):
        move_learner(learner, to, second)
    start = [tensors(learner) for learner in learners]
    results: dict[str, Any] = {
        "bit for bit": all(
            torch.equal(tensor, there[name])
            for here, there in zip(start, map(tensors, moved), strict=True)
            for name, tensor in here.items()
        )
    }
    results["metrics"] = [step(learners), step(moved)]
    results["gaps"] = [
        gap(tensors(learner), tensors(to), before) for learner, to, before in zip(learners, moved, start, strict=True)
    ]
    for learner in learners:
        learner.retire()
        results["bit for bit"] &= not any(buffer.untyped_storage().nbytes() for buffer in learner.engine.gradient_buffers())
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("family", "dtype", "layouts"),
    [
        *(("qwen2", "float32", layouts) for layouts in LAYOUTS),
        ("qwen2", "bfloat16", LAYOUTS[1]),
    ],
)
def test_the_next_step_is_the_same(tmp_path: Path, family: str, dtype: str, layouts: tuple[dict[str, Any], ...]) -> None:
    write_tiny_model(tmp_path / "model", family)
    # from another layout than the policy's: the critic goes where the policy came from
    sections = [
        {"policy": policy | sizes, "critic": critic | sizes}
        for policy, critic in (layouts, layouts[::-1])
        for sizes in [{"max_tokens_per_micro_batch": 64}]
    ]
    optimizer = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 1, "epsilon": 1e-3}
    configs = [
        tiny_config(
            tmp_path / "model",
            algorithm={"preset": "ppo", "kl": {"place": "none"}},
            optimizer=optimizer,
            model={"path": str(tmp_path / "model"), "dtype": dtype},
            **section,
        )
        for section in sections
    ]
    run_local_ranks(move_and_compare, (*configs, tmp_path / "results"), RANKS, 60)
    results = json.loads((tmp_path / "results").read_text())
    assert results["bit for bit"]
    before, after = results["metrics"]
    bound = 1e-5 if dtype == "float32" else 2e-2
    for here, there in zip(before, after, strict=True):
        assert there == pytest.approx(here, rel=bound, abs=bound)
        assert there["norm"] > 0 and there["rate"] == here["rate"] != 1e-3
    assert max(results["gaps"]) <= (1e-5 if dtype == "float32" else 0.1)
