"""A plan between two layouts of a random model, and what the ranks of both hold, in integers that say which element they are."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cases import PAD_MULTIPLE, megatron, random_architecture
from megarl.families.base.engine_rules import EngineLayout
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.plan import Plan, build_plan
from megarl.reshard.plan.shard_layout import tensor_table
from megarl.reshard.point_to_point import PointToPoint
from megarl.weights.mapping import build_weight_map
from slow_layouts import EngineSizes, MegatronSizes, Tensors, engine_rank, hugging_face_tensors, megatron_rank


@dataclass(frozen=True)
class Transfer:
    """A plan, the ranks of its sides, what these hold and need, and the whole tensors."""

    plan: Plan
    source_ranks: Sequence[int]
    destination_ranks: Sequence[int]
    held: list[Tensors]
    needed: list[Tensors]
    values: Tensors

    def fresh(self) -> tuple[Tensors, Tensors]:
        """What this rank holds, and memory for what it needs."""
        rank = dist.get_rank()
        held = self.held[self.source_ranks.index(rank)] if rank in self.source_ranks else {}
        needed = self.needed[self.destination_ranks.index(rank)] if rank in self.destination_ranks else {}
        return held, {name: torch.zeros_like(tensor) for name, tensor in needed.items()}

    def transport(self, timeout_seconds: float = 20.0) -> PointToPoint:
        device = torch.device("cpu")
        return PointToPoint(self.plan, self.source_ranks, self.destination_ranks, device=device, timeout_seconds=timeout_seconds)

    def check(self, got: Tensors) -> None:
        rank = dist.get_rank()
        expected = self.needed[self.destination_ranks.index(rank)] if rank in self.destination_ranks else {}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def transfer(
    folder: Path,
    family: str,
    source: tuple[MegatronSizes, Sequence[int]],
    target: tuple[MegatronSizes | EngineSizes, Sequence[int]],
    bucket_bytes: int = 1 << 14,
) -> Transfer:
    architecture = random_architecture(random.Random(family), family, folder)
    weight_map = build_weight_map(architecture, PAD_MULTIPLE, with_transformer_engine=False)
    tensors, values = tensor_table(weight_map, 8), hugging_face_tensors(architecture)
    sides, contents = [], []
    for sizes, ranks in (source, target):
        if isinstance(sizes, EngineSizes):
            layout = EngineLayout(engine=sizes.engine, tp=sizes.tp, ep=sizes.ep, replicas=sizes.replicas)
            sides.append(engine_shard_layout(architecture, layout, tensors))
            held = [engine_rank(values, architecture, sizes, rank) for rank in range(len(ranks))]
        else:
            sides.append(megatron(weight_map, sizes, tensors))
            held = [megatron_rank(values, architecture, sizes, rank, PAD_MULTIPLE) for rank in range(len(ranks))]
        contents.append([{name: tensor.contiguous() for name, tensor in rank.items()} for rank in held])
    plan = build_plan(sides[0], sides[1], tensors, Machines(gpus_per_node=8), bucket_bytes)
    return Transfer(plan, source[1], target[1], contents[0], contents[1], values)
