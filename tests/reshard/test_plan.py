"""Plans over random layouts, carried out on integers: every element arrives once, at its place, from a rank that holds it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import FAMILIES, Case, contents
from megarl.reshard.plan.plan import Plan


def matrix(tensor: Tensor) -> Tensor:
    return tensor.view(-1, 1) if tensor.dim() == 1 else tensor.view(-1, tensor.size(-1))


def carry_out(plan: Plan, held: list[dict[str, Tensor]], needed: list[dict[str, Tensor]]) -> None:
    """Run the plan from ``held`` into fresh parameters and compare them with ``needed``."""
    got = [{name: torch.zeros_like(tensor) for name, tensor in rank.items()} for rank in needed]
    writes = [{name: torch.zeros_like(tensor) for name, tensor in rank.items()} for rank in needed]
    for message in plan.messages():
        for copy in message.copies:
            values = matrix(held[message.sender][copy.source_parameter])[copy.source]
            target = matrix(got[message.receiver][copy.destination_parameter])[copy.destination]
            assert target.shape == values.shape and target.numel() > 0
            target.copy_(values)
            matrix(writes[message.receiver][copy.destination_parameter])[copy.destination] += 1
    for rank, tensors in enumerate(needed):
        for name, tensor in tensors.items():
            assert torch.equal(got[rank][name], tensor), (rank, name)
            assert torch.equal(writes[rank][name], (tensor != 0).to(tensor.dtype)), (rank, name)  # padding is zero, all else not


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to_engine", [True, False])
def test_every_element_is_written_once_from_the_right_one(tmp_path: Path, family: str, to_engine: bool) -> None:
    for seed in range(12):
        case = Case(seed, family, tmp_path, to_engine=to_engine)
        needed = contents(case, case.target)
        carry_out(case.plan, contents(case, case.source_sizes), needed)
        for number, name in enumerate(case.destination.parameters):
            shapes = {tuple(rank[name].shape) for rank in needed if name in rank}
            assert shapes == {case.destination.shapes[number]}, (case, name)


def test_optimizer_state_takes_the_same_way(tmp_path: Path) -> None:
    for seed in range(4):
        case = Case(seed, "deepseek_v3", tmp_path, to_engine=False, optimizer=True)
        held, needed = (
            [{name: t for name, t in rank.items() if not name.endswith("expert_bias")} for rank in contents(case, s)]
            for s in (case.source_sizes, case.target)
        )
        carry_out(case.plan, held, needed)
        assert case.plan.message_bytes.sum() == 4 * sum((t != 0).sum().item() for rank in needed for t in rank.values())
