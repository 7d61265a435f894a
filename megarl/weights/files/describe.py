"""What a model folder or checkpoint holds: layout, files, sizes, dtypes."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.errors import CheckpointError, shortened
from megarl.json_text import read_json_object
from megarl.weights.checkpoint import POLICY
from megarl.weights.distributed_checkpoint import CheckpointTensor, DistributedCheckpoint
from megarl.weights.file_digests import size_damage
from megarl.weights.files.model_folder import FolderKind, folder_kind
from megarl.weights.files.safetensors_files import SafetensorsFolder
from megarl.weights.files.shard_folder import ShardFolder
from megarl.weights.manifest import read_manifest

OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # keys of its state begin so; several optimizers when there are experts


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor: name, shape, dtype, and how many chunks it is kept in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_chunks: int

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that ``inspect`` shows.

    Attributes:
        layout: how the model is kept, in words.
        facts: name and value, such as the family or the step of a run.
        files: name and bytes of every file.
        weights: its tensors.
        optimizer: tensors of the optimizer's state.
    """

    layout: str
    facts: dict[str, str]
    files: dict[str, int]
    weights: list[TensorLine]
    optimizer: list[TensorLine]


def describe_folder(path: Path) -> Description:
    """Look into a folder, reading headers and metadata only.

    Raises:
        MegaRLError: it is no model, or an unfinished or damaged one.
    """
    kind = folder_kind(path)
    files = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
    if kind is FolderKind.ENGINE_SHARDS:
        shards = ShardFolder(path)
        lines = [
            TensorLine(f"rank {rank} {name}", tensor.shape, tensor.dtype, 1)
            for rank, stored in enumerate(shards.ranks)
            for name, tensor in stored.items()
        ]
        return Description(shards.shard_map.layout, _config_facts(path), files, lines, [])
    if kind is FolderKind.HUGGING_FACE:
        folder = SafetensorsFolder(path)
        weights = [TensorLine(name, folder.shapes[name], folder.dtypes[name], 1) for name in folder.shapes]
        return Description("Hugging Face safetensors", _config_facts(path), files, weights, [])
    in_run = (path / POLICY).is_dir()
    facts = _run_facts(path) if in_run else _config_facts(path)
    checkpoint = DistributedCheckpoint(path / POLICY if in_run else path)
    lines = [_line(name, tensor) for name, tensor in sorted(checkpoint.tensors.items())]
    return Description(
        "Megatron torch_dist checkpoint" + (" of a run" if in_run else ""),
        facts,
        files,
        [line for line in lines if not OPTIMIZER.match(line.name)],
        [line for line in lines if OPTIMIZER.match(line.name)],
    )


def _line(name: str, tensor: CheckpointTensor) -> TensorLine:
    return TensorLine(name, tensor.shape, tensor.dtype, len(tensor.chunks))


def _config_facts(path: Path) -> dict[str, str]:
    try:
        config = read_json_object(path / "config.json")
    except (OSError, ValueError):
        return {"family": "unknown, there is no readable config.json"}
    names = ("num_hidden_layers", "hidden_size", "vocab_size")
    family = {"family": shortened(str(config.get("model_type")))}
    return family | {name: shortened(str(config[name])) for name in names if name in config}


def _run_facts(path: Path) -> dict[str, str]:
    manifest = read_manifest(path)
    if problem := size_damage(path, manifest.files):
        raise CheckpointError(f"{problem}; use another checkpoint")
    return {
        "step": str(manifest.state.step),
        "weight version": str(manifest.state.weight_version),
        "megatron-core": manifest.megatron_core,
    }


def totals_by_dtype(lines: list[TensorLine]) -> list[tuple[str, int, int, int]]:
    """Return for each dtype its name, tensors, elements, bytes."""
    counts = Counter(line.dtype for line in lines)
    return [
        (
            str(dtype).removeprefix("torch."),
            count,
            sum(math.prod(line.shape) for line in lines if line.dtype == dtype),
            sum(line.num_bytes for line in lines if line.dtype == dtype),
        )
        for dtype, count in counts.items()
    ]
