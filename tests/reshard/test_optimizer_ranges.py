"""Optimizer state that each data parallel rank holds a range of, cut at random places: plans over random layouts, carried out on
integers in one process, bring every element once."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import BUCKET, FAMILIES, Case, contents
from megarl.reshard.optimizer_state import MAIN, ParameterState, held_ranges, optimizer_parts, ranges_of
from megarl.reshard.plan.plan import build_plan
from megarl.reshard.plan.shard_layout import as_matrix
from slow_layouts import MegatronSizes, Tensors

States = list[dict[str, ParameterState]]


def shards(sizes: MegatronSizes, held: list[Tensors], seed: object) -> States:
    """Each parameter of each pipeline stage cut, flattened, at random places into one range for each replica."""
    states: States = []
    for rank, tensors in enumerate(held):
        stage, per_stage = divmod(rank, sizes.world_size // sizes.pp)
        states.append({})
        for name, tensor in tensors.items():
            group = (sizes.etp or sizes.tp) * sizes.ep if ".local_experts." in name else sizes.tp
            replicas, replica = sizes.world_size // sizes.pp // group, per_stage // group
            rng = random.Random(f"{seed} {name} {stage}")
            cuts = [0, *sorted(rng.randint(0, tensor.numel()) for _ in range(replicas - 1)), tensor.numel()]
            start, stop = cuts[replica], cuts[replica + 1]
            if start < stop:
                values = tensor.reshape(-1)[start:stop].clone()
                states[rank][name] = ParameterState(start, as_matrix(tensor.shape)[1], {MAIN: values})
    return states


def without_buffers(held: list[Tensors]) -> list[Tensors]:
    return [{name: tensor for name, tensor in rank.items() if not name.endswith("expert_bias")} for rank in held]


def filled(states: States, value: int) -> States:
    return [
        {name: ParameterState(s.start, s.columns, {MAIN: torch.full_like(s.tensors[MAIN], value)}) for name, s in rank.items()}
        for rank in states
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_reaches_its_owner_once(tmp_path: Path, family: str) -> None:
    for seed in range(6):
        case = Case(seed, family, tmp_path, to_engine=False, optimizer=True)
        held = shards(case.source_sizes, without_buffers(contents(case, case.source_sizes)), f"{seed} source")
        needed = shards(case.target, without_buffers(contents(case, case.target)), f"{seed} destination")
        source, destination = (
            held_ranges(side, [ranges_of(side, rank) for rank in states], with_copies=with_copies)
            for side, states, with_copies in ((case.source, held, False), (case.destination, needed, True))
        )
        plan = build_plan(source, destination, case.tensors, case.machines, BUCKET)
        got, writes = filled(needed, 0), filled(needed, 0)
        for message in plan.messages():
            for copy in message.copies:
                values = optimizer_parts(held[message.sender], MAIN)[copy.source_parameter].region(copy.source)
                optimizer_parts(got[message.receiver], MAIN)[copy.destination_parameter].region(copy.destination).copy_(values)
                optimizer_parts(writes[message.receiver], MAIN)[copy.destination_parameter].region(copy.destination).add_(1)
        for rank, states in enumerate(needed):
            for name, state in states.items():
                expected: Tensor = state.tensors[MAIN]
                assert torch.equal(got[rank][name].tensors[MAIN], expected), (case, rank, name)
                # rows that pad the vocabulary are zero and nothing is written there
                assert torch.equal(writes[rank][name].tensors[MAIN], (expected != 0).to(expected.dtype)), (case, rank, name)
