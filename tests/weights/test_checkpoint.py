"""Checkpoints: resumed equals uninterrupted, bit for bit in the same layout, to 1e-5 in another; nothing half-written is read."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megarl.algorithms.algorithm import Algorithm
from megarl.cli.parity import parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.errors import CheckpointError
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.types import TokenOutputs
from megarl.weights import checkpoint as checkpoint_module
from megarl.weights.checkpoint import (
    CheckpointWriter,
    DataState,
    check_checkpoint_together,
    load_policy,
    read_data_state,
    whole_checkpoints,
)
from megarl.weights.manifest import RunState
from tiny import PROMPTS, tiny_config, write_tiny_model

UPDATES = 6
SAVE_AFTER = 3


def train(config: Config, folder: Path, resume: bool, asynchronous: bool, output: Path) -> None:
    """UPDATES updates with a checkpoint after SAVE_AFTER, or the rest of them from that checkpoint."""
    policy = Policy(config, total_updates=UPDATES)
    writer = CheckpointWriter(folder, policy.weight_map, keep=2, asynchronous=asynchronous)
    first = 0
    if resume:
        checkpoint = whole_checkpoints(folder)[-1]
        first = check_checkpoint_together(checkpoint, policy.weight_map).state.step
        policy.load_state(load_policy(checkpoint, policy.sharded_state(is_loading=True)))
    packed = synthetic_batch(PROMPTS, config)
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    records = []
    for step in range(first, UPDATES):
        old, entropies = policy.engine.forward_only(packed)
        scores = TokenOutputs(old=old + 0.1, entropies=entropies, reference=old - 0.2, values=None)
        result = policy.update(algorithm.prepare(packed, scores, step=0).batches[0], algorithm.objective)
        records.append(dict(result.metrics) | {"norm": result.gradient_norm, "lr": result.learning_rate})
        if step + 1 == SAVE_AFTER:
            state = RunState(step=step + 1, weight_version=step + 1, data={"position": 7})
            writer.save(policy.sharded_state(), state, {"groups": ["ü"]} if is_main_rank() else None)
    writer.close()
    tensors = dict(policy.hugging_face_tensors())
    if is_main_rank():
        save_file(tensors, output)
        output.with_suffix(".json").write_text(json.dumps(records[SAVE_AFTER - first :]))


def config_for(folder: Path, layout: str, dtype: str = "float32") -> tuple[Config, int]:
    schedule = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2}
    model = {"path": str(folder / "model"), "dtype": dtype}
    return with_layout(tiny_config(folder / "model", optimizer=schedule, model=model), parse_layout(layout))


def run(
    folder: Path, layout: str, *, resume: bool = False, asynchronous: bool = False, dtype: str = "float32"
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    config, num_ranks = config_for(folder, layout, dtype)
    output = folder / "out.safetensors"
    run_local_ranks(train, (config, folder / "checkpoints", resume, asynchronous, output), num_ranks, 120)
    return load_file(output), json.loads(output.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("family", "layout", "other", "asynchronous"),
    [
        ("qwen2", "tp=2,pp=2", "dp=2", False),
        ("qwen2", "pp=2,dp=2", "tp=2,pp=2,vpp=2", False),
        ("olmo2", "dp=2", "tp=4", True),
        ("qwen3", "tp=2,cp=2,sequence_parallel=true", "pp=4", False),
        ("llama", "dp=2,distributed_optimizer=false", "tp=2,distributed_optimizer=false", False),
        # the first stage has no experts
        ("deepseek_v3", "pp=2,ep=2,dp=2,num_layers_in_first_pipeline_stage=1", "tp=2,ep=2,dp=2,sequence_parallel=true", False),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, family: str, layout: str, other: str, asynchronous: bool) -> None:
    write_tiny_model(tmp_path / "model", family)
    weights, metrics = run(tmp_path, layout, asynchronous=asynchronous)
    assert [path.name for path in whole_checkpoints(tmp_path / "checkpoints")] == ["step_00000003"]

    resumed_weights, resumed_metrics = run(tmp_path, layout, resume=True)
    assert resumed_metrics == metrics
    for name, tensor in weights.items():
        assert torch.equal(resumed_weights[name], tensor), name

    moved_weights, moved_metrics = run(tmp_path, other, resume=True)
    for expected, actual in zip(metrics, moved_metrics, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, tensor in weights.items():
        assert (moved_weights[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("layout", ["dp=2", "pp=2,dp=2", "dp=2,distributed_optimizer=false"])
def test_bfloat16_resumed_equals_uninterrupted(tmp_path: Path, layout: str) -> None:
    write_tiny_model(tmp_path / "model", "qwen2")
    weights, metrics = run(tmp_path, layout, dtype="bfloat16")
    resumed_weights, resumed_metrics = run(tmp_path, layout, resume=True, dtype="bfloat16")
    assert resumed_metrics == metrics
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(resumed_weights[name], tensor), name


def resume_only(config: Config, folder: Path) -> None:
    policy = Policy(config, total_updates=UPDATES)
    checkpoint = whole_checkpoints(folder)[-1]
    data = read_data_state(checkpoint, check_checkpoint_together(checkpoint, policy.weight_map).state)
    assert data == DataState(position={"position": 7}, pending={"groups": ["ü"]} if is_main_rank() else None)
    load_policy(checkpoint, policy.sharded_state(is_loading=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_tiny_model(folder / "model", "llama")
    run(folder, "dp=2")
    return folder


def test_data_comes_back_on_rank_0(saved: Path) -> None:
    config, num_ranks = config_for(saved, "dp=2")
    run_local_ranks(resume_only, (config, saved / "checkpoints"), num_ranks, 60)


def test_unfinished_save_is_never_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000003", tmp_path / "checkpoints" / "step_00000009")
    (tmp_path / "checkpoints" / "step_00000009" / "manifest.json").unlink()
    assert [path.name for path in whole_checkpoints(tmp_path / "checkpoints")] == ["step_00000003"]


def save_many(config: Config, folder: Path, keep: int) -> None:
    policy = Policy(config, total_updates=1)
    writer = CheckpointWriter(folder, policy.weight_map, keep=keep, asynchronous=False)
    for step in range(1, 5):
        writer.save(policy.sharded_state(), RunState(step=step, weight_version=step, data={}))
        dist.barrier()
    helpers = psutil.Process().children()  # the queue of write results: with torch it would cost each rank seconds and memory
    assert helpers and not [one for one in helpers if "libtorch" in Path(f"/proc/{one.pid}/maps").read_text()]


def test_only_the_newest_are_kept(saved: Path, tmp_path: Path) -> None:
    config, _ = config_for(saved, "")
    run_local_ranks(save_many, (config, tmp_path, 2), 1, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_rotation_does_not_follow_links(saved: Path, tmp_path: Path) -> None:
    """Of a checkpoint that leads into another run only the link goes, and a step is not saved into another run either."""
    shutil.copytree(saved / "checkpoints", tmp_path / "other")
    other = tmp_path / "other" / "step_00000003"
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in ("step_00000000", "step_00000002"):
        (checkpoints / name).symlink_to(other)
    (checkpoints / "step_00000001" / "policy").parent.mkdir()
    (checkpoints / "step_00000001" / "policy").symlink_to(other / "policy")
    (checkpoints / "step_00000001" / "manifest.json").symlink_to(other / "manifest.json")
    config, _ = config_for(saved, "")
    run_local_ranks(save_many, (config, checkpoints, 1), 1, 60)
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000004"]
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_full_disk_is_refused_before_anything_is_written(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    config, _ = config_for(saved, "")
    with pytest.raises(CheckpointError, match=r"GB free; free some space or lower checkpoint\.keep"):
        run_local_ranks(save_many, (config, tmp_path / "checkpoints", 1), 1, 60)
    assert not list((tmp_path / "checkpoints").iterdir())
