"""Which rank stands where in a layout, and which pipeline stage holds which layer: arithmetic only, no process group.

The order of the axes is that of ``megarl.parallel.layout`` ("tp-cp-ep-dp-pp", tp fastest). Experts have axes of their own over
the same ranks: expert tensor parallel, expert parallel, expert data parallel, and the same pipeline stages.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megarl.config.schema import ParallelConfig
from megarl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AxisSizes:
    """The sizes of one role's axes over ``world_size`` ranks.

    Attributes:
        dp: data parallel size, world size / (tp · cp · pp).
        etp: expert tensor parallel size.
        expert_dp: data parallel size of experts, world size / (etp · ep · pp).
        num_layers_in_first_pipeline_stage: None means the equal share, and likewise for the last.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    vpp: int
    etp: int
    ep: int
    expert_dp: int
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the role."""
        return self.tp * self.cp * self.dp * self.pp

    def dense_ranks(self) -> NDArray[np.int32]:
        """Return the rank at each coordinate, [pp, dp, cp, tp], for everything but experts."""
        return np.arange(self.world_size, dtype=np.int32).reshape(self.pp, self.dp, self.cp, self.tp)

    def expert_ranks(self) -> NDArray[np.int32]:
        """Return the rank at each coordinate, [pp, expert dp, ep, etp], for experts."""
        return np.arange(self.world_size, dtype=np.int32).reshape(self.pp, self.expert_dp, self.ep, self.etp)

    def pipeline_rank_of_layers(self, num_layers: int) -> list[int]:
        """Return for each layer the pipeline rank that holds it.

        Chunks of layers go round the ranks ``vpp`` times (megatron-core's ``get_transformer_layer_offset``).

        Raises:
            ConfigError: the layers cannot be shared out.
        """
        per_rank = self._layers_per_pipeline_rank(num_layers)
        chunks = [(rank, layers // self.vpp) for _ in range(self.vpp) for rank, layers in enumerate(per_rank)]
        return [rank for rank, layers in chunks for _ in range(layers)]

    def _layers_per_pipeline_rank(self, num_layers: int) -> list[int]:
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        layers = num_layers - (first or 0) - (last or 0)
        stages = self.pp - (first is not None) - (last is not None)
        if stages < 0 or layers < 0 or (layers % stages if stages else layers):
            raise ConfigError(
                f"{num_layers} layers cannot be shared out over pp {self.pp} stages"
                + (f", {first} in the first" if first is not None else "")
                + (f", {last} in the last" if last is not None else "")
                + f": {layers} layers remain for {stages} stages; choose num_layers_in_first_pipeline_stage and "
                "num_layers_in_last_pipeline_stage so that the others get as many each"
            )
        per_rank = [layers // stages if stages else 0] * stages
        per_rank = [*([] if first is None else [first]), *per_rank, *([] if last is None else [last])]
        if any(count % self.vpp for count in per_rank):
            raise ConfigError(f"vpp {self.vpp} does not divide the layers of every pipeline stage {per_rank}; choose another vpp")
        return per_rank


def axis_sizes(config: ParallelConfig, world_size: int) -> AxisSizes:
    """Return the axes of ``config`` over ``world_size`` ranks.

    Raises:
        ConfigError: the sizes do not divide the world.
    """
    etp = config.etp or config.tp
    for names, size in (
        (f"tp {config.tp} × pp {config.pp} × cp {config.cp}", config.tp * config.pp * config.cp),
        (f"etp {etp} × ep {config.ep} × pp {config.pp}", etp * config.ep * config.pp),
    ):
        if world_size % size:
            raise ConfigError(f"world size {world_size} is not divisible by {names} = {size}")
    return AxisSizes(
        tp=config.tp,
        cp=config.cp,
        dp=world_size // (config.tp * config.pp * config.cp),
        pp=config.pp,
        vpp=config.vpp,
        etp=etp,
        ep=config.ep,
        expert_dp=world_size // (etp * config.ep * config.pp),
        num_layers_in_first_pipeline_stage=config.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=config.num_layers_in_last_pipeline_stage,
    )
