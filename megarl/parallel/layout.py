"""The layout of one role over its ranks of the world, and its process groups.

megatron-core's ``parallel_state`` stays uninitialised: every role passes its own ProcessGroupCollection, so that two roles can
have two layouts in one world and a forgotten read of a global fails loudly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megarl.config.schema import ParallelConfig
from megarl.parallel.axis_sizes import axis_sizes

RANK_ORDER = "tp-cp-ep-dp-pp"

Shared = TypeVar("Shared")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where this rank stands in one role; of the ranks outside the role only ``is_member`` and ``share`` have an answer.

    Attributes:
        config: the sizes.
        ranks: of the role, in the world.
        dp: data parallel size, the role's ranks / (tp · pp · cp).
        groups: megatron-core's process groups of the role; each is None on the ranks outside it.
    """

    config: ParallelConfig
    ranks: range
    dp: int
    groups: ProcessGroupCollection

    @property
    def is_member(self) -> bool:
        """Whether this rank has a part of the role's model."""
        return dist.get_rank() in self.ranks

    @property
    def is_whole_world(self) -> bool:
        """Whether every rank has a part of the role's model."""
        return len(self.ranks) == dist.get_world_size()

    def share(self, value: Shared | None) -> Shared:
        """Give every rank of the world what the first rank of the role has; collective where the role is not the whole world.

        Args:
            value: equal on all ranks of the role, and None on the others.
        """
        box = [value]
        if not self.is_whole_world:
            dist.broadcast_object_list(box, src=self.ranks.start)
        assert box[0] is not None
        return box[0]

    @property
    def tp_rank(self) -> int:
        """Rank within the tensor parallel group."""
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        """Number of this rank's pipeline stage."""
        return self.groups.pp.rank()

    @property
    def cp_rank(self) -> int:
        """Rank within the context parallel group."""
        return self.groups.cp.rank()

    @property
    def dp_rank(self) -> int:
        """Number of this rank's data parallel replica."""
        return self.groups.dp.rank()

    @property
    def is_last_stage(self) -> bool:
        """True where the pipeline's output is."""
        return self.pp_rank == self.config.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence is padded to a multiple of this, so that zigzag context parallel chunks are equal."""
        return 2 * self.config.cp if self.config.cp > 1 else 1

    @property
    def tokens_multiple(self) -> int:
        """The tokens of a micro-batch are padded to a multiple of this, so that every tp rank holds equally many."""
        return self.sequence_multiple * (self.config.tp if self.config.sequence_parallel else 1)


def _new_group(rank_lists: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Create every group on every rank, in the same order; return this rank's."""
    # torch would give it 30 minutes, whatever the world has
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(torch.device("cpu")).options._timeout
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def _hierarchical_groups(context_groups: Sequence[Sequence[int]], neighbours: int) -> list[dist.ProcessGroup | None]:
    """Return of each context parallel group the neighbours that exchange heads, and the rings across them."""
    exchanges = [ranks[first : first + neighbours] for ranks in context_groups for first in range(0, len(ranks), neighbours)]
    rings = [ranks[first::neighbours] for ranks in context_groups for first in range(neighbours)]
    return [_new_group(exchanges), _new_group(rings)]


def build_layout(config: ParallelConfig, ranks: range | None = None) -> Layout:
    """Create the process groups of one role. Every rank of the world must call it, roles in the same order.

    Args:
        config: the sizes.
        ranks: of the role, in the world; the whole world when not given.

    Raises:
        ConfigError: the sizes do not divide the ranks.
    """
    ranks = ranks or range(dist.get_world_size())
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()  # the one global that linear layers need and no argument replaces
    sizes = axis_sizes(config, len(ranks))
    dense = parallel_state.RankGenerator(
        tp=config.tp, ep=1, dp=sizes.dp, pp=config.pp, cp=config.cp, order=RANK_ORDER, rank_offset=ranks.start
    )
    expert = parallel_state.RankGenerator(
        tp=sizes.etp, ep=config.ep, dp=sizes.expert_dp, pp=config.pp, cp=1, order=RANK_ORDER, rank_offset=ranks.start
    )

    groups = ProcessGroupCollection()
    for field, generator, axes in (
        ("tp", dense, "tp"),
        ("pp", dense, "pp"),
        ("mp", dense, "tp-pp"),
        ("cp", dense, "cp"),
        ("tp_cp", dense, "tp-cp"),
        ("dp", dense, "dp"),
        ("dp_cp", dense, "dp-cp"),
        ("tp_dp_cp", dense, "tp-dp-cp"),
        ("ep", expert, "ep"),
        ("expt_tp", expert, "tp"),
        ("tp_ep", expert, "tp-ep"),
        ("tp_ep_pp", expert, "tp-ep-pp"),
        ("expt_dp", expert, "dp"),
    ):
        setattr(groups, field, _new_group(generator.get_ranks(axes)))
    groups.hcp = _hierarchical_groups(dense.get_ranks("cp"), config.ulysses_size) if config.ulysses_size else None
    pipelines = dense.get_ranks("pp")
    groups.embd = _new_group([parallel_state.default_embedding_ranks(ranks) for ranks in pipelines])
    groups.pos_embd = _new_group([parallel_state.default_position_embedding_ranks(ranks) for ranks in pipelines])
    groups.intra_dp_cp, groups.intra_expt_dp = groups.dp_cp, groups.expt_dp
    is_whole_world = len(ranks) == dist.get_world_size()
    groups.intra_dist_opt, groups.inter_dist_opt = dist.group.WORLD if is_whole_world else _new_group([ranks]), None
    return Layout(config=config, ranks=ranks, dp=sizes.dp, groups=groups)
