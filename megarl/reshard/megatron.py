"""From one Megatron model to another of the same world: weights and optimizer state, whatever their layouts and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megarl.families.base.weight_rules import Kind
from megarl.models.build import CausalLM
from megarl.parallel.axis_sizes import axis_sizes
from megarl.parallel.layout import Layout
from megarl.reshard.optimizer_state import (
    MAIN,
    MOMENTS,
    ParameterState,
    get_step,
    held_ranges,
    optimizer_parts,
    parameter_states,
    ranges_of,
    set_step,
)
from megarl.reshard.packed_messages import flat_parts
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.plan import build_plan
from megarl.reshard.plan.shard_layout import ShardLayout, TensorTable, megatron_shard_layout, optimizer_table, tensor_table
from megarl.reshard.point_to_point import PointToPoint
from megarl.weights.mapping import WeightMap
from megarl.weights.transfer import global_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings:
    """How a transfer is carried out.

    Attributes:
        bucket_bytes: most that a rank sends, or receives, at a time; it needs buffers of twice that.
        gpus_per_node: ranks on one machine, which rather send to each other.
        timeout_seconds: for each bucket.
    """

    bucket_bytes: int
    gpus_per_node: int
    timeout_seconds: float


class WeightTransfer:
    """Moves the weights of one model into another, as often as asked.

    Collective over the world. Both models are of the same family, sizes and dtype, given by ``weight_map``.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        source: tuple[list[CausalLM], Layout],
        destination: tuple[list[CausalLM], Layout],
        settings: TransferSettings,
    ) -> None:
        """Plan the transfer.

        Raises:
            WeightsError: a model and the weight map differ.
            TransferError: the ranks were given different models or layouts.
        """
        self._weight_map, self._source, self._destination = weight_map, source, destination
        tensors = _actual_sizes(tensor_table(weight_map, 0), weight_map, global_parameters(source[0], weight_map, source[1]))
        shard_layouts = [_shard_layout(weight_map, layout, tensors) for _, layout in (source, destination)]
        self._transport = _transport(shard_layouts, tensors, settings, (source[1], destination[1]))

    @property
    def bytes_received(self) -> int:
        """That this rank gets from others each time."""
        return self._transport.bytes_received

    def move(self) -> None:
        """Write the destination's weights.

        A destination with float32 main parameters must be told (``MegatronOptimizer.reload_model_params``), unless an
        ``OptimizerTransfer`` follows, which moves these too.

        Raises:
            TransferError: it failed on some rank; the destination must not be used.
        """
        held, needed = (global_parameters(chunks, self._weight_map, layout) for chunks, layout in (self._source, self._destination))
        self._transport.execute(flat_parts(held), flat_parts(needed))
        self._zero_padding(needed)

    @torch.no_grad()
    def _zero_padding(self, parameters: dict[str, Tensor]) -> None:
        """Zero the rows that pad the vocabulary: no message has them, and the destination may never have been loaded."""
        layout = self._destination[1]
        for name, tensor in parameters.items():  # none on ranks outside the destination
            if self._weight_map.parameters[name].kind is Kind.VOCABULARY:
                padding = self._weight_map.shard(name, layout.tp_rank, layout.config.tp).padding
                tensor[tensor.size(0) - padding :].zero_()


class OptimizerTransfer:
    """Moves the state of Adam of one model into that of another: moments, float32 main parameters and the count of steps.

    Collective over the world. Either end may or may not use the distributed optimizer; its shards go from owner to owner. Both
    must have their state already, if only zeros. The learning-rate schedule is not moved.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        source: tuple[list[CausalLM], Layout, ChainedOptimizer | None],
        destination: tuple[list[CausalLM], Layout, ChainedOptimizer | None],
        settings: TransferSettings,
    ) -> None:
        """Plan the transfer. A rank outside an end of the transfer has no optimizer there.

        Raises:
            WeightsError: a model and the weight map differ.
            TransferError: the ranks were given different models or layouts.
        """
        tensors = optimizer_table(weight_map)
        self._weight_map, self._source, self._destination = weight_map, source, destination
        held, needed = self._states()
        shard_layouts = [
            _state_layout(_shard_layout(weight_map, source[1], tensors), source[1], held, with_copies=False),
            _state_layout(_shard_layout(weight_map, destination[1], tensors), destination[1], needed, with_copies=True),
        ]
        self._transport = _transport(shard_layouts, tensors, settings, (source[1], destination[1]))
        has_main_copies = torch.tensor(any(chunk.config.params_dtype != torch.float32 for chunk in source[0]), dtype=torch.int32)
        dist.all_reduce(has_main_copies, dist.ReduceOp.MAX)
        self._keys = (*MOMENTS, MAIN) if has_main_copies else MOMENTS

    def move(self) -> None:
        """Write the destination's state.

        Raises:
            TransferError: it failed on some rank; the destination must not be used.
        """
        held, needed = self._states()
        for key in self._keys:
            self._transport.execute(optimizer_parts(held, key), optimizer_parts(needed, key))
        optimizer = self._source[2]
        step = torch.tensor(0 if optimizer is None else get_step(optimizer))
        dist.all_reduce(step, dist.ReduceOp.MAX)
        if self._destination[2] is not None:
            set_step(self._destination[2], int(step))

    def _states(self) -> list[dict[str, ParameterState]]:
        return [
            {} if optimizer is None else parameter_states(optimizer, global_parameters(chunks, self._weight_map, layout))
            for chunks, layout, optimizer in (self._source, self._destination)
        ]


def _actual_sizes(tensors: TensorTable, weight_map: WeightMap, parameters: dict[str, Tensor]) -> TensorTable:
    """Return the table with the element sizes that the ranks' parameters have: not all parts of a 16-bit model need be 16-bit."""
    sizes = torch.zeros(len(tensors.numbers), dtype=torch.int64)
    for name, tensor in parameters.items():
        for hugging_face in weight_map.parameters[name].hugging_face:
            sizes[tensors.numbers[hugging_face]] = tensor.element_size()
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    return replace(tensors, element_sizes=sizes.numpy())


def _shard_layout(weight_map: WeightMap, layout: Layout, tensors: TensorTable) -> ShardLayout:
    return megatron_shard_layout(weight_map, axis_sizes(layout.config, len(layout.ranks)), tensors)


def _state_layout(shards: ShardLayout, layout: Layout, states: dict[str, ParameterState], *, with_copies: bool) -> ShardLayout:
    ranges = [ranges_of(shards, {})] * dist.get_world_size()
    dist.all_gather_object(ranges, ranges_of(shards, states))
    return held_ranges(shards, [ranges[rank] for rank in layout.ranks], with_copies=with_copies)


def _transport(
    shard_layouts: Sequence[ShardLayout], tensors: TensorTable, settings: TransferSettings, layouts: tuple[Layout, Layout]
) -> PointToPoint:
    source, destination = layouts
    shift = destination.ranks.start - source.ranks.start
    machines = Machines(gpus_per_node=settings.gpus_per_node, first_destination_gpu=shift)
    plan = build_plan(shard_layouts[0], shard_layouts[1], tensors, machines, settings.bucket_bytes)
    device = torch.device(torch.cuda.current_device())
    return PointToPoint(plan, source.ranks, destination.ranks, device=device, timeout_seconds=settings.timeout_seconds)
