"""Policy, reference, critic and reward model on ranks and in layouts of their own against one rank."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers import AutoModelForSequenceClassification

from megarl.algorithms.algorithm import Algorithm
from megarl.cli.parity import ParityRun, parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Critic, Policy, compute_outputs
from megarl.types import PackedBatch
from tiny import PROMPTS, tiny_config, write_tiny_model

BOUND = 1e-5
LAYOUTS = [
    # all models on the same ranks
    "tp=2,pp=2,critic.tp=4,critic.sequence_parallel=true,reference.dp=4,reward_model.pp=2,reward_model.dp=2",
    "cp=2,critic.pp=2,critic.vpp=2,reference.tp=2,reward_model.cp=2,reward_model.context_parallel_method=all_to_all",
    "pp=4,critic.cp=4,reference.tp=2,reference.cp=2,reward_model.tp=2,reward_model.first_rank=1",
    # overlapping
    "tp=2,dp=2,critic.pp=2,critic.first_rank=1,critic.dp=2,reference.first_rank=3,reference.cp=2,reward_model.first_rank=2",
    "dp=2,critic.tp=2,critic.first_rank=1,reference.first_rank=2,reward_model.pp=2,reward_model.first_rank=1",
    # policy and critic disjoint, the frozen models beside either
    "tp=2,pp=2,critic.tp=2,critic.first_rank=4,critic.dp=2,reference.pp=2,reference.first_rank=4,reward_model.first_rank=6",
    # all disjoint, rank 0 in the policy, in the critic, in the reference, in the reward model
    "dp=2,critic.tp=2,critic.first_rank=2,critic.pp=2,reference.first_rank=6,reward_model.first_rank=7",
    "tp=2,first_rank=2,critic.pp=2,critic.vpp=2,reference.first_rank=4,reward_model.first_rank=5",
    "pp=2,first_rank=3,distributed_optimizer=false,critic.cp=2,critic.first_rank=1,reference.tp=1,reward_model.first_rank=5",
    "cp=2,first_rank=1,critic.dp=2,critic.first_rank=3,critic.distributed_optimizer=false,reference.first_rank=5,reward_model.tp=1",
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> ParityRun:
    folder = tmp_path_factory.mktemp("roles")
    write_tiny_model(folder, "qwen2")
    roles: dict[str, Any] = {}
    for seed, role in enumerate(("critic", "reward_model"), start=1):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        with torch.no_grad():
            model.score.weight.normal_(std=0.2)
        model.save_pretrained(folder / role)
        roles[role] = {"path": str(folder / role), "max_tokens_per_micro_batch": 64}
    write_tiny_model(folder / "reference", "qwen2", intermediate_size=64)
    roles["reference"] = {"path": str(folder / "reference"), "max_tokens_per_micro_batch": 64}
    return ParityRun(tiny_config(folder, algorithm={"preset": "ppo"}, **roles), PROMPTS, folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_scores_equal_one_rank(one_rank: ParityRun, layout: str) -> None:
    row = one_rank.compare_layout(layout, parse_layout(layout))
    assert max(row.worst_gap, row.loss_gap, row.norm_gap, row.output_gap) <= BOUND, row


def work_one_after_the_other(config: Config, packed: PackedBatch) -> None:
    """The critic's ranks do nothing until the policy's are done, and then the other way round."""
    policy, critic = Policy(config, total_updates=1), Critic(config, total_updates=1)
    algorithm, store = Algorithm(config.algorithm, config.rollout.max_new_tokens), distributed_c10d._get_default_store()
    scores = compute_outputs(policy, None, critic, packed)
    batches = algorithm.prepare(packed, replace(scores, reference=scores.old), 0).batches
    works = {
        "policy": (policy, lambda: [policy.update(batch, algorithm.objective) for batch in batches]),
        "critic": (critic, lambda: [critic.update(batch, algorithm.value_objective) for batch in batches]),
    }
    for first in works:
        for name in sorted(works, key=lambda name: name != first):
            model, update = works[name]
            done = [f"{first}/{name}/{rank}" for rank in model.engine.layout.ranks]
            if model.engine.layout.is_member:
                model.engine.compute_outputs(packed)
                update()
                store.set(f"{first}/{name}/{dist.get_rank()}", "done")
            store.wait(done)


@pytest.mark.timeout(60)
def test_models_on_disjoint_ranks_do_not_wait_for_each_other(one_rank: ParityRun) -> None:
    """A collective of scoring or learning that the other model's ranks took part in would never end here."""
    config, num_ranks = with_layout(one_rank.config, parse_layout("tp=2,critic.pp=2,critic.first_rank=2"))
    run_local_ranks(work_one_after_the_other, (config, synthetic_batch(PROMPTS, config)), num_ranks, 30)
