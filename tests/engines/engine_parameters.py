"""What the comparisons of plans with the parameters of real engines share."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.engines.environment import default_python
from megarl.families.base.engine_rules import EngineLayout
from megarl.families.registry import read_architecture
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.shard_layout import ShardLayout, tensor_table
from megarl.weights.mapping import build_weight_map
from tiny import CLASSES

sys.path.insert(0, str(Path(__file__).parent.parent / "reshard"))
from slow_layouts import hugging_face_tensors

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_numbered_model(folder: Path, family: str, **changes: Any) -> None:
    """A model folder in which every number says which tensor and which element of it it is."""
    config_class, model_class, special = CLASSES[family]
    config_class(**(SIZES | special | changes), architectures=[model_class.__name__]).save_pretrained(folder)
    tensors = hugging_face_tensors(read_architecture(folder))
    save_file({name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors")


def check_loaded(folder: Path, layout: EngineLayout) -> None:
    """``rank_*.safetensors``, which an engine's ranks saved, are what a plan for this layout writes."""
    architecture = read_architecture(folder)
    table = tensor_table(build_weight_map(architecture, 1, with_transformer_engine=False), 4)
    shards = engine_shard_layout(architecture, layout, table)
    tensors = hugging_face_tensors(architecture)
    for rank in range(layout.ranks_per_engine):
        loaded = load_file(folder / f"rank_{rank}.safetensors")
        written = write_boxes(shards, [tensors[name].float() for name in table.numbers], rank)
        assert {name: tensor.shape for name, tensor in loaded.items()} == {name: tensor.shape for name, tensor in written.items()}
        for name, tensor in loaded.items():
            assert torch.equal(tensor, written[name]), (folder, rank, name)


def write_boxes(shards: ShardLayout, tensors: list[Tensor], rank: int) -> dict[str, Tensor]:
    """What a rank holds when all boxes are copied, one after the other, into zeros."""
    held = {name: torch.zeros(shape) for name, shape in zip(shards.parameters, shards.shapes, strict=True)}
    for tensor, row, column, rows, columns, parameter, local_row, local_column, rank_set in shards.boxes.tolist():
        if rank in shards.rank_sets[rank_set]:
            source, target = tensors[tensor], held[shards.parameters[parameter]]
            source = source.reshape(-1, source.shape[-1] if source.dim() > 1 else 1)
            target = target.view(-1, target.shape[-1] if target.dim() > 1 else 1)
            part = source[row : row + rows, column : column + columns]
            target[local_row : local_row + rows, local_column : local_column + columns] = part
    return held


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_in_engine(
    engine: str, script: str, num_ranks: int, arguments: list[str], environment: dict[str, str], folder: Path
) -> None:
    """One process of the engine's environment for each rank: ``script RANK ARGUMENTS``. Logs go to ``folder``."""
    python, path = default_python(engine), Path(__file__).with_name(script)
    logs = [folder / f"rank_{rank}.log" for rank in range(num_ranks)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                command = [python, path, str(rank), *arguments]
                ranks.append(subprocess.Popen(command, env=environment | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT))
        for process in ranks:
            if process.wait(timeout=500):
                break
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    failed = [log.read_text()[-3000:] for process, log in zip(ranks, logs, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
