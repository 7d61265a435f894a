"""Models on disk as the shards that an engine's ranks load, each its own (``--load-format sharded_state``).

The files hold the state dict that the loader fills (vLLM 0.32.0, model_executor/model_loader/sharded_state_loader.py; SGLang
0.5.23, srt/model_loader/loader.py): the parameters of ``engine_shard_layout``, under other names where modules of the engine share
one, as the loaders keep the name that sorts first.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import ConfigError, WeightsError
from megarl.families.base.architecture import Architecture
from megarl.families.base.engine_rules import EngineLayout
from megarl.families.registry import family_of
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.shard_layout import tensor_table
from megarl.weights.export import copy_side_files
from megarl.weights.files.convert import (
    Options,
    Written,
    purpose,
    read_cast,
    set_dtype,
    split_names,
    target_dtype,
    write_file,
)
from megarl.weights.files.model_folder import PAD_MULTIPLE, ModelFolder, open_model, readable_architecture
from megarl.weights.files.partial_folder import PartialFolder
from megarl.weights.files.shard_folder import Block, ShardMap, ShardParameter, rank_file
from megarl.weights.files.sources import check_tensors
from megarl.weights.files.stored_tensors import Buffer, ReportBytes, TensorFolder, read_ahead, windows
from megarl.weights.mapping import WeightMap, build_weight_map

# vLLM's modules that hold another's module, the path of which sorts first (layers/mla.py, layers/fused_moe/runner/)
VLLM_LATENT_ATTENTION = ("q_a_layernorm.", "q_b_proj.", "q_proj.", "o_proj.")
VLLM_SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")  # buffers of attention, 1 without quantization


def shard_map(weight_map: WeightMap, layout: EngineLayout) -> ShardMap:
    """Return what every rank's shards hold.

    Raises:
        ConfigError: the layout does not divide the model, or the engine cannot load such a model or layout from shards.
    """
    architecture = weight_map.architecture
    _check_loadable(architecture, layout)
    table = tensor_table(weight_map, element_size=1)
    held = engine_shard_layout(architecture, layout, table)
    tensors = list(table.numbers)
    blocks: list[list[Block]] = [[] for _ in held.parameters]
    for tensor, row, column, rows, columns, parameter, local_row, local_column, rank_set in held.boxes.tolist():
        assert local_column == 0, held.parameters[parameter]
        ranks = tuple(sorted(held.rank_sets[rank_set].tolist()))
        blocks[parameter].append(Block(tensors[tensor], row, column, rows, columns, local_row, ranks))
    parameters = {
        _state_dict_name(name, architecture, layout): ShardParameter(shape, 0.0, tuple(own))
        for name, shape, own in zip(held.parameters, held.shapes, blocks, strict=True)
    }
    if layout.traits.has_scales:
        attention = "mla_attn.mla_attn" if architecture.mla else "attn"
        for layer in range(architecture.num_layers):
            for scale in VLLM_SCALES:
                parameters[f"model.layers.{layer}.self_attn.{attention}.{scale}"] = ShardParameter((), 1.0, ())
    shapes = {name: shape for name, shape in weight_map.hugging_face_shapes().items() if name in table.numbers}
    return ShardMap(layout.engine, layout.tp, layout.ep, shapes, parameters)


def _check_loadable(architecture: Architecture, layout: EngineLayout) -> None:
    if layout.traits.tells_shards_by_tp and layout.ep > layout.tp:
        raise ConfigError(
            f"vllm ep {layout.ep} with tp {layout.tp}: vLLM tells shards apart by tp rank only, and its data parallel ranks need "
            f"different experts; use tp {layout.ep} or ep {layout.tp}"
        )
    family = family_of(architecture.family)
    if architecture.tied_embeddings and layout.engine in family.never_tied_by:
        raise ConfigError(
            f"{layout.engine} does not tie the embeddings of {architecture.family}, as config.json does; use the other engine"
        )
    dense_layers = architecture.moe is not None and not all(architecture.moe.is_moe_layer)
    if dense_layers and layout.engine in family.experts_everywhere_in:
        raise ConfigError(
            f"{layout.engine} gives every layer of {architecture.family} experts, config.json (mlp_only_layers) does not; use vllm"
        )


def _state_dict_name(name: str, architecture: Architecture, layout: EngineLayout) -> str:
    """Return the first by name of those that a parameter has in the engine's state dict."""
    if name == "model.embed_tokens.weight" and architecture.tied_embeddings:
        return "lm_head.weight"
    if not layout.traits.wraps_modules:
        return name
    module, _, rest = name.partition(".self_attn.")
    if architecture.mla and rest.startswith(VLLM_LATENT_ATTENTION):
        return f"{module}.self_attn.mla_attn.{rest}"
    return name.replace(".mlp.gate.", ".mlp.experts.gate.").replace(".mlp.shared_experts.", ".mlp.experts._shared_experts._layer.")


def write_engine_shards(
    source: Path, output: Path, layout: EngineLayout, config: Path | None, options: Options, progress: ReportBytes
) -> Written:
    """Write the shards of every rank with the config and tokenizer files.

    Args:
        source: a Hugging Face folder, a Megatron checkpoint or a run's.
        layout: of one engine.
        config: folder of config.json and tokenizer, where a Megatron checkpoint has none.

    Returns:
        Tensors and bytes of all ranks together.

    Raises:
        MegaRLError: the input is damaged or of another model, the layout does not divide it, or the output cannot be written.
    """
    model = open_model(source, config)
    weight_map = _weight_map(model)
    shards = shard_map(weight_map, layout)
    dtypes = _dtypes(shards, weight_map, model.tensors, options.dtype)
    sizes = {name: math.prod(parameter.shape) * dtypes[name].itemsize for name, parameter in shards.parameters.items()}
    parts = split_names(sizes, dtypes, options.file_bytes)
    total = sum(sizes.values()) * shards.num_ranks
    assert model.config is not None and model.tokenizer is not None
    made = {"engine": layout.engine, "tp": layout.tp, "ep": layout.ep}
    with PartialFolder(output, purpose("engine shards", model.tensors.folder, model.config, options) | made) as partial:
        partial.check_space(total)
        for rank in range(shards.num_ranks):
            for part, names in enumerate(parts):
                described = {name: (shards.parameters[name].shape, dtypes[name]) for name in names}
                pieces = _pieces(model.tensors, shards, rank, dtypes, names)
                write_file(partial, rank_file(rank, part), described, pieces, lambda done: progress(done, total))
        with partial.errors():
            copy_side_files(model.config, model.tokenizer, partial.path)
            set_dtype(partial.path, dtypes["model.norm.weight"])
            shards.write(partial.path)
        partial.publish()
    return Written(len(sizes) * shards.num_ranks, total, tuple(weight_map.notices(model.tensors.shapes)))


def _weight_map(model: ModelFolder) -> WeightMap:
    if model.weight_map is not None:
        return model.weight_map
    assert model.config is not None
    weight_map = build_weight_map(readable_architecture(model.config), PAD_MULTIPLE, with_transformer_engine=False)
    check_tensors(model.tensors, weight_map)
    return weight_map


def _dtypes(shards: ShardMap, weight_map: WeightMap, tensors: TensorFolder, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each of the engine's parameters; those of no tensor are float32."""
    owners = {name: parameter.megatron for parameter in weight_map.parameters.values() for name in parameter.hugging_face}
    found: dict[str, torch.dtype] = {}
    for name, parameter in shards.parameters.items():
        targets = {
            target_dtype(weight_map, owners[block.tensor], tensors.dtypes[block.tensor], dtype): block.tensor
            for block in parameter.blocks
        }
        if len(targets) > 1:
            one, other, *_ = (f"{tensor} is {target}" for target, tensor in targets.items())
            raise WeightsError(f"{tensors.folder}: {one} and {other}, but the engine keeps them in one tensor; give --dtype")
        found[name] = next(iter(targets), torch.float32)
    return found


def _pieces(
    tensors: TensorFolder, shards: ShardMap, rank: int, dtypes: dict[str, torch.dtype], names: list[str]
) -> Iterator[Tensor]:
    """Rows of one rank's parameters after one another."""
    blocks = {name: shards.parameters[name].blocks_of(rank) for name in names}
    scratch = Buffer()

    def read(piece: tuple[str, int, int], buffer: Buffer) -> Tensor:
        name, start, stop = piece
        parameter = shards.parameters[name]
        target = buffer.tensor((stop - start, parameter.matrix[1]), dtypes[name]).fill_(parameter.fill)
        for block in blocks[name]:
            low, high = max(start, block.local_row), min(stop, block.local_row + block.rows)
            if low < high:
                _read_block(tensors, block, low - block.local_row, target[low - start : high - start], scratch)
        return target

    return read_ahead(read, ((name, *window) for name in names for window in windows(shards.parameters[name].matrix, dtypes[name])))


def _read_block(tensors: TensorFolder, block: Block, first: int, target: Tensor, scratch: Buffer) -> None:
    """Fill ``target`` [rows, columns] with rows of a block, from its row ``first`` on.

    Tensors are read by whole rows; of one that is cut along columns each rank uses a part.
    """
    shape = tensors.shapes[block.tensor]
    row = block.row + first
    if len(shape) == 1 or shape[1] == block.columns:
        read_cast(tensors, block.tensor, row, target.view(-1, *shape[1:]))
        return
    for start, stop in windows((len(target), shape[1]), target.dtype):
        rows = scratch.tensor((stop - start, shape[1]), target.dtype)
        read_cast(tensors, block.tensor, row + start, rows)
        target[start:stop] = rows[:, block.column : block.column + block.columns]
