"""Opening a model however it lies on disk: Hugging Face safetensors, a Megatron checkpoint, a run's, or an engine's shards."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megarl.config.load import load_config
from megarl.config.schema import ModelConfig
from megarl.errors import CheckpointError, ConfigError, WeightsError, shortened
from megarl.families.base.architecture import Architecture
from megarl.families.registry import read_architecture
from megarl.models.scaled_folder import with_scaled_model
from megarl.parallel.launch import single_rank_world
from megarl.weights.checkpoint import POLICY, check_checkpoint
from megarl.weights.distributed_checkpoint import DistributedCheckpoint, is_distributed_checkpoint
from megarl.weights.files.checkpoint_map import CheckpointMap, MegatronFolder
from megarl.weights.files.partial_folder import JOURNAL
from megarl.weights.files.safetensors_files import SafetensorsFolder
from megarl.weights.files.shard_folder import SHARD_MAP, ShardFolder
from megarl.weights.files.stored_tensors import TensorFolder
from megarl.weights.mapping import WeightMap, build_weight_map

PAD_MULTIPLE = ModelConfig.model_fields["vocabulary_pad_multiple"].default


class FolderKind(Enum):
    """What a folder can hold, in words."""

    HUGGING_FACE = "a Hugging Face model"
    MEGATRON = "a Megatron checkpoint"
    ENGINE_SHARDS = "an engine's shards"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        layout: how it is kept, in words.
        tensors: as Hugging Face tensors.
        config: folder with its config.json; None where that was not needed.
        tokenizer: folder with its tokenizer files.
        weight_map: of the model; None where that was not needed.
    """

    layout: str
    tensors: TensorFolder
    config: Path | None
    tokenizer: Path | None
    weight_map: WeightMap | None


def open_model(path: Path, config: Path | None = None) -> ModelFolder:
    """Open a folder of any kind.

    Args:
        path: the folder.
        config: folder with config.json of a Megatron checkpoint that has none.

    Raises:
        MegaRLError: it is no model, an unfinished or damaged one, or its config.json is wrong.
    """
    match folder_kind(path):
        case FolderKind.MEGATRON:
            return open_megatron(path, config)
        case FolderKind.ENGINE_SHARDS:
            return _open_shards(path)
    return ModelFolder("Hugging Face safetensors", SafetensorsFolder(path), path, path, None)


def folder_kind(path: Path) -> FolderKind:
    """Return what a folder holds, by the files that are in it.

    Raises:
        WeightsError: it is no folder of a model at all, or an unfinished one.
    """
    if not path.is_dir():
        raise WeightsError(f"{path} is not a folder; give the folder of a model or a checkpoint")
    if (path / JOURNAL).exists():
        raise WeightsError(f"{path} is an unfinished conversion; repeat the command that made it to finish it")
    if is_distributed_checkpoint(path) or (path / POLICY).is_dir():
        return FolderKind.MEGATRON
    if (path / SHARD_MAP).exists():
        return FolderKind.ENGINE_SHARDS
    if any(path.glob("*.safetensors*")):
        return FolderKind.HUGGING_FACE
    raise WeightsError(
        f"{path} holds no *.safetensors and no finished Megatron checkpoint; "
        "give the folder of a model, or checkpoints/step_… of a run"
    )


def _open_shards(path: Path) -> ModelFolder:
    tensors = ShardFolder(path)
    weight_map = build_weight_map(readable_architecture(path), PAD_MULTIPLE, with_transformer_engine=False)
    return ModelFolder(tensors.shard_map.layout, tensors, path, path, weight_map)


def open_megatron(path: Path, config: Path | None = None) -> ModelFolder:
    """Open a Megatron checkpoint; raises like ``open_model``."""
    if (kind := folder_kind(path)) is not FolderKind.MEGATRON:
        raise CheckpointError(f"{path} holds {kind.value}; give a Megatron checkpoint")
    tokenizer, pad_multiple = config or path, PAD_MULTIPLE
    in_run = (path / POLICY).is_dir()
    if in_run and config is None:
        run_folder = path.absolute().parent.parent
        model = with_scaled_model(load_config(run_folder / "config.yaml"), run_folder, writes=False).model
        config, tokenizer, pad_multiple = model.path, model.tokenizer or model.path, model.vocabulary_pad_multiple
    config = config or path
    try:
        architecture = readable_architecture(config)
    except ConfigError as error:
        raise ConfigError(f"{error}; name the folder of the model's config.json with --config") from error
    with single_rank_world():
        checkpoint_map = CheckpointMap(architecture, pad_multiple)
    if in_run:
        check_checkpoint(path, checkpoint_map.weight_map)
    checkpoint = DistributedCheckpoint(path / POLICY if in_run else path)
    layout = "Megatron torch_dist checkpoint" + (" of a run" if in_run else "")
    return ModelFolder(layout, MegatronFolder(checkpoint, checkpoint_map), config, tokenizer, checkpoint_map.weight_map)


def readable_architecture(folder: Path) -> Architecture:
    """Return the architecture of a config.json, after the checks that tell what is wrong with it in one line."""
    architecture = read_architecture(folder)
    if architecture.quantization is not None:
        raise ConfigError(
            f"{folder / 'config.json'}: the weights are quantized ({shortened(architecture.quantization, 40)}); give the model in "
            "bfloat16 or float32"
        )
    return architecture
