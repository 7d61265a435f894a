"""Every method that runs gives one rank's loss and gradients in every layout: one world per layout computes all methods."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.cli.parity import (
    CRITIC,
    LayoutResult,
    ParityRun,
    compare_results,
    compute_gradients,
    megatron_parameters,
    parse_layout,
    with_layout,
)
from megarl.config.schema import Config
from megarl.config.schema.algorithm import PRESETS
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Critic, Policy, is_main_rank
from tiny import PROMPTS, tiny_config, write_tiny_model

BOUND = 1e-5
ULYSSES = "context_parallel_method=all_to_all"
LAYOUTS = [
    "max_tokens_per_micro_batch=25",
    "dp=2,max_tokens_per_micro_batch=30",
    "tp=2,sequence_parallel=true",
    "pp=2",
    "cp=2",
    f"cp=2,{ULYSSES},max_tokens_per_micro_batch=30",
    "cp=4,max_tokens_per_micro_batch=40",
    "pp=2,vpp=2,cp=2,distributed_optimizer=false",
    "tp=2,cp=2,dp=2,sequence_parallel=true,max_tokens_per_micro_batch=40",
]
CHANGES: dict[str, dict[str, Any]] = {
    "kimi_k1_5": {"reward_shaping": {"length_start": 0, "correct_reward": 0.5}},
    # so wide that about half the responses are inside the clip range, so tight that about half the tokens are outside
    "gspo": {"clip": {"low": 0.05, "high": 0.05}},
    "gspo_token": {"clip": {"low": 0.05, "high": 0.05}},
    "gmpo": {"clip": {"low": 0.2, "high": 0.2}},
    "cispo": {"clip": {"low": 0.2, "high": 0.2}},
}
MORE: dict[str, dict[str, Any]] = {
    "corrections": {"preset": "dapo", "sampler_correction": {"method": "mis", "level": "sequence"}, "entropy_coefficient": 0.02},
    "process_rewards": {"preset": "dr_grpo", "advantage": "process_rewards"},
    "token_correction": {"preset": "grpo", "sampler_correction": {"method": "tis", "cap": 1.1}, "clip": {"dual": 3.0}},
    "whole_kimi": {"preset": "kimi_k1_5", "mirror_descent_tau": 2.0, "sampler_correction": {"method": "tis", "cap": 1.1}},
    "whole_gmpo": {"preset": "gmpo", "sampler_correction": {"method": "mis", "cap": 3.0}},
    "whole_gspo": {"preset": "gspo", "sampler_correction": {"method": "tis", "cap": 1.1}, "clip": {"low": 0.05, "high": 0.05}},
}


def methods(folder: Path, layout: str) -> tuple[dict[str, Config], int]:
    """A config for each method in one layout, and its ranks."""
    algorithms = {name: {"preset": name} | CHANGES.get(name, {}) for name in PRESETS} | MORE
    configs, num_ranks = {}, 1
    for name, algorithm in algorithms.items():
        config, num_ranks = with_layout(tiny_config(folder, algorithm=algorithm), parse_layout(layout))
        configs[name] = config
    return configs, num_ranks


def compute_all(configs: dict[str, Config], layout: str, batch_file: Path, output: Path) -> None:
    packed, scores = torch.load(batch_file, weights_only=False)
    policy, critic = Policy(configs["grpo"], total_updates=1), Critic(configs["ppo"], total_updates=1)
    results = {}
    for name, config in configs.items():
        critic_of_method = critic if config.algorithm.advantage == "gae" else None
        loss, loss_scale, gradients = compute_gradients(policy, critic_of_method, config, packed, scores)
        norm = float(sum(gradient.double().square().sum() for gradient in gradients.values()) ** 0.5)
        results[name] = LayoutResult(
            layout=layout,
            num_ranks=dist.get_world_size(),
            loss=loss,
            loss_scale=loss_scale,
            gradient_norm=norm,
            gradients=gradients,
            parameters=megatron_parameters(policy, critic_of_method),
            outputs={},
        )
    if is_main_rank():
        torch.save(results, output)


@dataclass(frozen=True)
class Methods:
    """The model, the batch, and every method on one rank."""

    folder: Path
    batch_file: Path
    reference: dict[str, LayoutResult]

    def compute(self, layout: str) -> dict[str, LayoutResult]:
        configs, num_ranks = methods(self.folder, layout)
        output = self.folder / "out.pt"
        run_local_ranks(compute_all, (configs, layout, self.batch_file, output), num_ranks, 120)
        return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Methods]:
    folder = tmp_path_factory.mktemp("methods")
    write_tiny_model(folder, "qwen2")
    ParityRun(tiny_config(folder, algorithm={"preset": "ppo"}), PROMPTS, folder)  # its batch has values too
    without = Methods(folder, folder / "batch.pt", {})
    yield Methods(folder, folder / "batch.pt", without.compute(""))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_one_rank(one_rank: Methods, layout: str) -> None:
    results = one_rank.compute(layout)
    assert set(results) == set(one_rank.reference) and len(results) >= 19
    for name, result in results.items():
        row = compare_results(one_rank.reference[name], result)
        assert max(row.worst_gap, row.loss_gap, row.norm_gap) <= BOUND, (name, row)


def test_the_methods_differ(one_rank: Methods) -> None:
    """Two methods with the same gradient would mean that a choice is ignored."""
    flat = {
        name: torch.cat([result.gradients[key].flatten() for key in sorted(result.gradients) if CRITIC not in key]).double()
        for name, result in one_rank.reference.items()
    }
    names = sorted(flat)
    for number, name in enumerate(names):
        assert flat[name].norm() > 1e-3
        for other in names[number + 1 :]:
            # for advantages of whole responses they are the same by design
            if {name, other} != {"gspo", "gspo_token"}:
                assert (flat[name] - flat[other]).norm() > 1e-3 * flat[name].norm(), (name, other)
