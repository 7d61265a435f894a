"""Weights into a rank's model chunks and out of all ranks' chunks, through the weight map."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import WeightsError, listed
from megarl.families.base.weight_rules import Layers
from megarl.models.build import CausalLM
from megarl.parallel.axis_sizes import axis_sizes
from megarl.parallel.layout import Layout
from megarl.weights.files.sources import WeightSource
from megarl.weights.mapping import WeightMap
from megarl.weights.shards import Parameter


def global_parameters(chunks: list[CausalLM], weight_map: WeightMap, layout: Layout) -> dict[str, Tensor]:
    """Return this rank's parameters, and the buffers of the weight map, by global name (layers and experts of the whole model).

    There are none on a rank outside the role.

    Raises:
        WeightsError: the model has parameters that the map does not know, or lacks some that the map puts on this rank.
    """
    if not layout.is_member:
        return {}
    num_experts = weight_map.architecture.num_experts // layout.config.ep
    first_expert = layout.groups.ep.rank() * num_experts
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for chunk in chunks:
        local = dict(chunk.named_parameters()) | dict(chunk.named_buffers())
        global_names = _global_names(chunk, weight_map, range(first_expert, first_expert + num_experts))
        missing = [global_name for name, global_name in global_names.items() if name not in local]
        unknown += [name for name, _ in chunk.named_parameters() if name not in global_names]
        if missing or unknown:
            problems = [
                f"{what}: {listed(names)}" for what, names in (("not in the map", unknown), ("not in the model", missing)) if names
            ]
            raise WeightsError(
                f"Megatron's model and the weight map of family {weight_map.architecture.family} differ; {'; '.join(problems)}"
            )
        found |= {global_name: local[name] for name, global_name in global_names.items()}
    return found


def _global_names(chunk: CausalLM, weight_map: WeightMap, experts: range) -> dict[str, str]:
    """Name in the chunk to global name of everything that the map puts there."""
    layer_numbers = {layer.layer_number - 1: local for local, layer in enumerate(chunk.decoder.layers)}
    names = {}
    for parameter in weight_map.parameters.values():
        if parameter.layers is Layers.BEFORE:
            is_here = chunk.pre_process
        elif parameter.layers is Layers.AFTER:
            # a stage that holds both ends uses the embedding itself where they are tied
            is_here = chunk.post_process and not (parameter.is_copy and chunk.pre_process)
        else:
            is_here = parameter.layer in layer_numbers and (parameter.expert is None or parameter.expert in experts)
        if is_here:
            layer = None if parameter.layer is None else layer_numbers[parameter.layer]
            expert = None if parameter.expert is None else parameter.expert - experts.start
            names[parameter.template.format(layer=layer, expert=expert)] = parameter.megatron
    return names


@torch.no_grad()
def load_weights(chunks: list[CausalLM], source: WeightSource, weight_map: WeightMap, layout: Layout) -> None:
    """Fill this rank's parameters, reading only its own slices.

    Raises:
        WeightsError: the model and the weight map differ.
    """
    for name, tensor in global_parameters(chunks, weight_map, layout).items():
        tp_rank, tp = _tensor_parallel_place(weight_map.parameters[name], layout)
        shard = weight_map.shard(name, tp_rank, tp)
        expected = weight_map.shard_shape(name, tp_rank, tp)
        if tuple(tensor.shape) != expected:
            raise WeightsError(f"Megatron's {name} is {list(tensor.shape)}, the weight map says {list(expected)}")
        start = 0
        for piece in shard.slices:
            values = source.read(piece)
            tensor.narrow(shard.dim, start, values.size(shard.dim)).copy_(values)
            start += values.size(shard.dim)
        tensor.narrow(shard.dim, start, shard.padding).zero_()


def _tensor_parallel_place(parameter: Parameter, layout: Layout) -> tuple[int, int]:
    """Rank and size of the group that the parameter is cut over."""
    group = layout.groups.tp if parameter.expert is None else layout.groups.expt_tp
    return group.rank(), group.size()


def hugging_face_tensors(
    chunks: list[CausalLM], weight_map: WeightMap, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors, one Megatron parameter after another, on rank 0; other ranks get none but must exhaust it.

    Args:
        dtype: of the model's parameters, which rank 0 need not have.

    Yields:
        Name and full tensor on the rank's device, in the model's type; buffers in float32.
    """
    names = [name for name, parameter in weight_map.parameters.items() if not parameter.is_copy]
    return _gather(names, lambda tensor: tensor.data, dtype, chunks, weight_map, layout)


def hugging_face_gradients(chunks: list[CausalLM], weight_map: WeightMap, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Likewise the whole gradients, from the gradient buffers of megatron-core's DDP (float32)."""
    names = [name for name, parameter in weight_map.parameters.items() if not (parameter.is_copy or parameter.is_buffer)]
    return _gather(names, lambda tensor: tensor.main_grad, torch.float32, chunks, weight_map, layout)  # type: ignore[attr-defined]


@torch.no_grad()
def _gather(
    names: list[str],
    value: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    chunks: list[CausalLM],
    weight_map: WeightMap,
    layout: Layout,
) -> Iterator[tuple[str, Tensor]]:
    wanted = set(names)
    local = {name: value(tensor) for name, tensor in global_parameters(chunks, weight_map, layout).items() if name in wanted}
    device = torch.cuda.current_device()
    holders_of = _Holders(weight_map, layout)
    for name in names:
        holders = holders_of(weight_map.parameters[name])
        rank = dist.get_rank()
        if rank in holders and rank != 0:
            dist.send(local[name].contiguous(), dst=0)
        if rank != 0:
            continue
        shards = []
        for tp_rank, holder in enumerate(holders):
            if holder == 0:
                shards.append(local[name])
                continue
            shape = weight_map.shard_shape(name, tp_rank, len(holders))
            sent_as = torch.float32 if weight_map.parameters[name].is_buffer else dtype
            shards.append(torch.empty(shape, dtype=sent_as, device=device))
            dist.recv(shards[-1], src=holder)
        yield from _assemble(name, shards, weight_map)


class _Holders:
    """The ranks of the world that hold the parts of a parameter, in the order of the parts, in the first replica."""

    def __init__(self, weight_map: WeightMap, layout: Layout) -> None:
        sizes = axis_sizes(layout.config, len(layout.ranks))
        self._dense = sizes.dense_ranks() + layout.ranks.start
        self._experts = sizes.expert_ranks() + layout.ranks.start
        self._stages = sizes.pipeline_rank_of_layers(weight_map.architecture.num_layers)
        self._experts_per_rank = weight_map.architecture.num_experts // layout.config.ep
        self._weight_map = weight_map

    def __call__(self, parameter: Parameter) -> list[int]:
        stage = self._stage(parameter)
        if parameter.expert is None:
            ranks: list[int] = self._dense[stage, 0, 0].tolist()
        else:
            ranks = self._experts[stage, 0, parameter.expert // self._experts_per_rank].tolist()
        return ranks if self._weight_map.is_tensor_parallel(parameter.megatron) else ranks[:1]

    def _stage(self, parameter: Parameter) -> int:
        if parameter.layer is not None:
            return self._stages[parameter.layer]
        return 0 if parameter.layers is Layers.BEFORE else -1


def _assemble(name: str, shards: list[Tensor], weight_map: WeightMap) -> Iterator[tuple[str, Tensor]]:
    """Cut the parts of one Megatron parameter into its Hugging Face tensors."""
    parameter = weight_map.parameters[name]
    tensors = {source: shards[0].new_empty(shape) for source, shape in zip(parameter.hugging_face, parameter.shapes, strict=True)}
    for tp_rank, values in enumerate(shards):
        shard = weight_map.shard(name, tp_rank, len(shards))
        start = 0
        for piece in shard.slices:
            length = piece.stop - piece.start
            tensors[piece.name].narrow(piece.dim, piece.start, length).copy_(values.narrow(shard.dim, start, length))
            start += length
    yield from tensors.items()
