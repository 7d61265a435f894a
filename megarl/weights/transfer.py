"""Weights into a rank's model chunks and out of all ranks' chunks, through the weight map."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import WeightsError
from megarl.models.build import CausalLM
from megarl.parallel.layout import Layout
from megarl.weights.mapping import WeightMap
from megarl.weights.rules import hugging_face_shape
from megarl.weights.sources import WeightSource


def global_parameters(chunks: list[CausalLM]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name (layer numbers counted over the whole model)."""
    parameters = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            parameters[".".join(parts)] = parameter
    return parameters


@torch.no_grad()
def load_weights(chunks: list[CausalLM], source: WeightSource, weight_map: WeightMap, layout: Layout) -> None:
    """Fill this rank's parameters, reading only its own slices.

    Raises:
        WeightsError: the model has a parameter that the weight map does not know.
    """
    for name, parameter in global_parameters(chunks).items():
        if name not in weight_map.parameters:
            raise WeightsError(f"Megatron parameter {name} is not in the weight map of family {weight_map.architecture.family}")
        shard = weight_map.shard(name, layout.tp_rank, layout.config.tp)
        start = 0
        for piece in shard.slices:
            tensor = source.read(piece)
            target = parameter.narrow(shard.dim, start, tensor.size(shard.dim))
            target.copy_(tensor)
            start += tensor.size(shard.dim)
        parameter.narrow(shard.dim, start, shard.padding).zero_()


@torch.no_grad()
def hugging_face_tensors(
    chunks: list[CausalLM],
    weight_map: WeightMap,
    layout: Layout,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors, one Megatron parameter after another, on rank 0; other ranks get none but must exhaust it.

    Args:
        value: what to collect for each parameter, e.g. its gradient instead of its data; same shape as the parameter.

    Yields:
        Name and full tensor on the rank's device.
    """
    local = global_parameters(chunks)
    stages = _pipeline_stages(local, layout)
    tied = weight_map.architecture.tied_embeddings
    for name in weight_map.parameters:
        if tied and name == "output_layer.weight":
            continue  # the embedding's copy
        shards = _gather_shards(name, local, stages[name], weight_map, layout, value)
        if dist.get_rank() == 0:
            yield from _assemble(name, shards, weight_map)


def _pipeline_stages(local: dict[str, torch.nn.Parameter], layout: Layout) -> dict[str, int]:
    """Pipeline stage that holds each parameter."""
    held: list[list[str]] = [[] for _ in range(layout.config.pp)]
    dist.all_gather_object(held, list(local), group=layout.groups.pp)
    return {name: stage for stage, names in enumerate(held) for name in names}


def _gather_shards(
    name: str,
    local: dict[str, torch.nn.Parameter],
    stage: int,
    weight_map: WeightMap,
    layout: Layout,
    value: Callable[[torch.nn.Parameter], Tensor],
) -> list[Tensor]:
    """On rank 0, every tensor parallel rank's part of one parameter, from the first replica."""
    tp = layout.config.tp
    num_holders = tp if weight_map.is_tensor_parallel(name) else 1
    first_holder = stage * tp * layout.config.cp * layout.dp  # ranks count tp fastest, then cp, dp, pp
    rank = dist.get_rank()
    holders = range(first_holder, first_holder + num_holders)
    if rank in holders and rank != 0:
        dist.send(value(local[name]).contiguous(), dst=0)
    if rank != 0:
        return []
    shards = []
    for tp_rank, holder in enumerate(holders):
        if holder == 0:
            shards.append(value(local[name]))
        else:
            like = value(next(iter(local.values())))
            shard = torch.empty(weight_map.shard_shape(name, tp_rank, tp), dtype=like.dtype, device=like.device)
            dist.recv(shard, src=holder)
            shards.append(shard)
    return shards


def _assemble(name: str, shards: list[Tensor], weight_map: WeightMap) -> Iterator[tuple[str, Tensor]]:
    """Cut the parts of one Megatron parameter into its Hugging Face tensors."""
    architecture = weight_map.architecture
    tensors = {
        source: shards[0].new_empty(hugging_face_shape(source, architecture)) for source in weight_map.parameters[name].hugging_face
    }
    for tp_rank, values in enumerate(shards):
        shard = weight_map.shard(name, tp_rank, len(shards))
        start = 0
        for piece in shard.slices:
            length = piece.stop - piece.start
            tensors[piece.name].narrow(piece.dim, piece.start, length).copy_(values.narrow(shard.dim, start, length))
            start += length
    yield from tensors.items()
