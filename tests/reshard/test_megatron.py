"""From one Megatron model to another in one world: weights against those loaded straight from the Hugging Face folder, optimizer
state by the next update."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithms.algorithm import Algorithm
from megarl.cli.parity import parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.families.registry import read_architecture
from megarl.models.build import CausalLM, build_model_chunks
from megarl.parallel.launch import run_local_ranks
from megarl.parallel.layout import Layout, build_layout
from megarl.reshard.megatron import OptimizerTransfer, TransferSettings, WeightTransfer
from megarl.train.roles import Policy
from megarl.types import TokenOutputs
from megarl.weights.files.sources import SafetensorsSource
from megarl.weights.mapping import WeightMap, build_weight_map
from megarl.weights.transfer import global_parameters, load_weights
from slow_layouts import Tensors
from tiny import PROMPTS, tiny_config, write_tiny_model

RANKS = 4
LAUNCH_SECONDS = 120
SETTINGS = TransferSettings(bucket_bytes=1 << 16, gpus_per_node=2, timeout_seconds=30.0)
SEQUENCE = "sequence_parallel=true"


def config_of(folder: Path, layout: str, **overrides: Any) -> Config:
    config, num_ranks = with_layout(tiny_config(folder / "model", **overrides), parse_layout(layout))
    assert num_ranks == RANKS
    return config


def load(config: Config, weight_map: WeightMap) -> tuple[list[CausalLM], Layout]:
    layout = build_layout(config.policy.parallel)
    chunks = build_model_chunks(weight_map.architecture, config.model, config.policy, layout, seed=0)
    load_weights(chunks, SafetensorsSource(config.model.path, weight_map), weight_map, layout)
    return chunks, layout


def move_weights(pairs: Sequence[tuple[Config, Config]]) -> None:
    for first, second in pairs:
        architecture = read_architecture(first.model.path)
        weight_map = build_weight_map(architecture, first.model.vocabulary_pad_multiple, with_transformer_engine=False)
        source, destination = load(first, weight_map), load(second, weight_map)
        parameters = global_parameters(destination[0], weight_map, destination[1])
        expected = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        transfer = WeightTransfer(weight_map, source, destination, SETTINGS)
        for _ in range(2):
            with torch.no_grad():
                for tensor in parameters.values():
                    tensor.fill_(float("nan"))
            transfer.move()
            for name, tensor in parameters.items():
                assert torch.equal(tensor, expected[name]), (first.policy.parallel, second.policy.parallel, name)


@pytest.mark.parametrize(
    ("family", "dtype", "layouts"),
    [
        ("olmo2", "float32", ["tp=2,pp=2", "tp=4", "dp=4"]),
        ("qwen2", "bfloat16", ["pp=2,vpp=2,dp=2", "tp=2,dp=2", "pp=4", "tp=2,pp=2,vpp=2"]),
        ("mixtral", "float32", [f"tp=2,ep=2,dp=2,{SEQUENCE}", "ep=4,dp=4", "dp=4", "pp=2,ep=2,dp=2"]),
        ("deepseek_v3", "bfloat16", ["pp=2,ep=2,dp=2", f"tp=2,ep=2,etp=1,dp=2,{SEQUENCE}", "tp=2,cp=2"]),
    ],
)
def test_weights_are_those_of_the_folder(tmp_path: Path, family: str, dtype: str, layouts: list[str]) -> None:
    """From each layout to the next, and from the last to the first."""
    write_tiny_model(tmp_path / "model", family)
    model = {"path": str(tmp_path / "model"), "dtype": dtype}
    configs = [config_of(tmp_path, layout, model=model) for layout in layouts]
    pairs = list(zip(configs, [*configs[1:], configs[0]], strict=True))
    run_local_ranks(move_weights, (pairs,), RANKS, LAUNCH_SECONDS)


def update(policy: Policy, config: Config) -> tuple[dict[str, Tensor], float]:
    """One update; how much each Hugging Face tensor changed (rank 0), and the gradient norm."""
    packed = synthetic_batch(PROMPTS, config)
    before = {name: tensor.clone() for name, tensor in policy.hugging_face_tensors()}
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    old, entropies = policy.engine.forward_only(packed)
    outputs = TokenOutputs(old=old + 0.1, entropies=entropies, reference=old - 0.2, values=None)
    result = policy.update(algorithm.prepare(packed, outputs, step=0).batches[0], algorithm.objective)
    return {name: tensor - before[name] for name, tensor in policy.hugging_face_tensors()}, result.gradient_norm


def step_on_given_gradients(policy: Policy) -> Tensors:
    """One optimizer step on gradients that depend on nothing but names; the Hugging Face tensors after it (rank 0)."""
    weight_map, layout = policy.weight_map, policy.engine.layout
    for name, tensor in global_parameters(policy.engine.chunks, weight_map, layout).items():
        parameter = weight_map.parameters[name]
        if parameter.is_buffer:
            continue
        group = layout.groups.tp if parameter.expert is None else layout.groups.expt_tp
        shard = weight_map.shard(name, group.rank(), group.size())
        tensor.main_grad.zero_()
        start = 0
        for overlap in shard.slices:
            generator = torch.Generator().manual_seed(zlib.crc32(overlap.name.encode()))
            whole = torch.randn(weight_map.hugging_face_shapes()[overlap.name], generator=generator)
            length = overlap.stop - overlap.start
            tensor.main_grad.narrow(shard.dim, start, length).copy_(whole.narrow(overlap.dim, overlap.start, length))
            start += length
    policy.optimizer.step()
    return {name: tensor.clone() for name, tensor in policy.hugging_face_tensors()}


def train_on(first: Config, second: Config, output: Path) -> None:
    """Two updates in one layout, then the third in both, from their own gradients and from given ones."""
    source, destination = Policy(first, total_updates=6), Policy(second, total_updates=6)
    for _ in range(2):
        update(source, first)
    for policy in (source, destination):
        policy.optimizer.fill_state()
    models = [(policy.engine.chunks, policy.engine.layout) for policy in (source, destination)]
    states = [(*model, policy.optimizer.megatron) for model, policy in zip(models, (source, destination), strict=True)]
    transfers = WeightTransfer(source.weight_map, *models, SETTINGS), OptimizerTransfer(source.weight_map, *states, SETTINGS)

    def move() -> Tensors:
        for transfer in transfers:
            transfer.move()
        destination.optimizer.scheduler.num_steps = 0  # what is loaded is added
        destination.optimizer.scheduler.load_state_dict(source.optimizer.scheduler.state_dict())
        return {name: tensor.clone() for name, tensor in destination.hugging_face_tensors()}

    results = {"norm": 0.0, "gaps": {}}
    if first.model.dtype == "float32":
        weights = move()
        (changes, norm), (other_changes, other_norm) = update(source, first), update(destination, second)
        gaps = {name: gap(change, other_changes[name], weights[name]) for name, change in changes.items()}
        results = {"norm": abs(other_norm - norm) / norm, "gaps": gaps}
    move()
    after, other_after = step_on_given_gradients(source), step_on_given_gradients(destination)
    results["same"] = {name: torch.equal(tensor, other_after[name]) for name, tensor in after.items()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))


def gap(change: Tensor, other: Tensor, weight: Tensor) -> float:
    """How far two updates are apart, beyond the rounding of the weights that they were added to."""
    rounding = torch.finfo(weight.dtype).eps * weight.norm()
    return float(((other - change).norm() - rounding).clamp_min(0) / (change.norm() + rounding))


PLAIN = "distributed_optimizer=false"


@pytest.mark.parametrize(
    ("family", "layout", "other", "dtype"),
    [
        ("qwen2", f"tp=2,pp=2,{PLAIN}", "dp=4", "float32"),
        ("qwen2", "pp=2,vpp=2,dp=2", f"tp=2,dp=2,{PLAIN}", "float32"),
        ("llama", "dp=4", "tp=2,pp=2", "float32"),
        ("qwen2", "tp=2,dp=2", f"dp=4,{PLAIN}", "bfloat16"),
        ("mixtral", f"tp=2,ep=2,dp=2,{SEQUENCE}", "pp=2,ep=2,dp=2", "float32"),
        ("deepseek_v3", "pp=2,ep=2,dp=2", f"tp=2,ep=2,etp=1,dp=2,{SEQUENCE}", "float32"),
    ],
)
def test_both_take_the_same_next_step(tmp_path: Path, family: str, layout: str, other: str, dtype: str) -> None:
    write_tiny_model(tmp_path / "model", family)
    model = {"path": str(tmp_path / "model"), "dtype": dtype}
    optimizer = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 0, "clip_gradient": 0.0}
    configs = [config_of(tmp_path, text, model=model, optimizer=optimizer) for text in (layout, other)]
    run_local_ranks(train_on, (*configs, tmp_path / "results"), RANKS, LAUNCH_SECONDS)
    results = json.loads((tmp_path / "results").read_text())
    assert results["norm"] < 1e-5
    # softmax ignores a shift, so the gradients of key biases are rounding, and Adam makes whole steps of it
    assert max((gap for name, gap in results["gaps"].items() if "k_proj.bias" not in name), default=0.0) < 1e-5
    assert results["same"] and all(results["same"].values()), [name for name, same in results["same"].items() if not same]
