"""Policy, reference, critic and reward model on ranks and in layouts of their own against one rank."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megarl.loop.parity import ParityRun, parse_layout
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
    assert max(row.worst_gap, row.loss_gap, row.norm_gap, row.score_gap) <= BOUND, row
