"""Both conversions, bit for bit, for every family, and their checkpoints in other layouts and other hands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file
from transformers import AutoConfig

from megarl.cli.parity import parse_layout, with_layout
from megarl.config.load import save_config
from megarl.config.schema import Config
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.weights.checkpoint import CheckpointWriter
from megarl.weights.manifest import RunState
from tiny import CLASSES, tiny_config
from tools import SMALL_FILES, assert_same, make_model, tensors_of, tool


@pytest.mark.parametrize("family", CLASSES)
def test_round_trip_is_bit_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    model = make_model(tmp_path / "model", family)
    assert tool("hf_to_megatron", model, tmp_path / "megatron", *SMALL_FILES) == 0
    assert tool("megatron_to_hf", tmp_path / "megatron", tmp_path / "again", *SMALL_FILES) == 0
    assert_same(tensors_of(tmp_path / "again"), tensors_of(model))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((model / name).read_text())
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "again").glob("*.safetensors")}
    capsys.readouterr()
    assert tool("verify", model, tmp_path / "megatron") == 0
    lines = capsys.readouterr().out.splitlines()
    num_bytes = sum(tensor.nbytes for tensor in tensors_of(model).values())
    assert all(f"{len(tensors_of(model))} tensors, {num_bytes} bytes" in line for line in lines[:2])
    assert lines[0].split()[-1] == lines[1].split()[-1]
    assert not list(tmp_path.glob("*.partial"))


def start_and_load(config: Config, folder: Path) -> None:
    """Start from a converted checkpoint, and load it again by megatron-core alone; both exported."""
    policy = Policy(config, total_updates=1)
    started = dict(policy.hugging_face_tensors())
    for chunk in policy.engine.chunks:
        for tensor in (*chunk.parameters(), *chunk.buffers()):
            tensor.data.zero_()
    policy.load_weights(dist_checkpointing.load(policy.sharded_weights(), str(config.model.path)))
    loaded = dict(policy.hugging_face_tensors())
    if is_main_rank():
        save_file({name: tensor.clone() for name, tensor in started.items()}, folder / "started.safetensors")
        save_file({name: tensor.clone() for name, tensor in loaded.items()}, folder / "loaded.safetensors")


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("qwen2", ["tp=2", "pp=2,vpp=2", "tp=4,pp=2"]),
        ("llama", ["tp=2,pp=2"]),
        ("phi3", ["tp=2,pp=2"]),
        ("olmo2", ["tp=4"]),
        ("qwen3_moe", ["dp=2,ep=2", "tp=2,pp=2,ep=2,etp=1"]),
        ("deepseek_v3", ["tp=2,pp=2"]),
    ],
)
def test_any_layout_starts_from_a_converted_checkpoint(tmp_path: Path, family: str, layouts: list[str]) -> None:
    model = make_model(tmp_path / "model", family)
    assert tool("hf_to_megatron", model, tmp_path / "megatron") == 0
    for layout in layouts:
        config, num_ranks = with_layout(tiny_config(tmp_path / "megatron"), parse_layout(layout))
        (tmp_path / layout / "started").mkdir(parents=True)
        run_local_ranks(start_and_load, (config, tmp_path / layout), num_ranks, 60)
        for way in ("started", "loaded"):
            folder = tmp_path / layout / way
            folder.mkdir(exist_ok=True)
            shutil.move(tmp_path / layout / f"{way}.safetensors", folder)
            assert_same(tensors_of(folder), tensors_of(model))


def save_checkpoint(config: Config, output: Path) -> None:
    policy = Policy(config, total_updates=1)
    writer = CheckpointWriter(config.run_dir / "checkpoints", policy.weight_map, keep=1, asynchronous=False)
    writer.save(policy.sharded_state(), RunState(step=7, weight_version=7, data={}))
    tensors = dict(policy.hugging_face_tensors())
    if is_main_rank():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, output)


@pytest.mark.parametrize(("family", "layout"), [("qwen2", "tp=2,pp=2"), ("deepseek_v3", "tp=2,ep=2,etp=1")])
def test_a_runs_checkpoint_becomes_a_hugging_face_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, layout: str
) -> None:
    model = make_model(tmp_path / "model", family)
    start = {"path": str(model), "init": "random"}
    config, num_ranks = with_layout(tiny_config(model, model=start, run_dir=str(tmp_path / "run")), parse_layout(layout))
    (tmp_path / "expected").mkdir()
    run_local_ranks(save_checkpoint, (config, tmp_path / "expected" / "model.safetensors"), num_ranks, 60)
    save_config(config, tmp_path / "run" / "config.yaml")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"

    assert tool("megatron_to_hf", checkpoint, tmp_path / "out") == 0
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert tool("verify", checkpoint, tmp_path / "out") == 0
    capsys.readouterr()
    assert tool("inspect", checkpoint, "--tensors") == 0
    shown = capsys.readouterr().out
    assert "Megatron torch_dist checkpoint of a run" in shown and "step 7" in shown and "optimizer: " in shown
    assert "embedding.word_embeddings.weight [132, 64] float32 in 2 chunks" in shown


def test_cast(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "deepseek_v3")
    original = tensors_of(model)
    assert tool("hf_to_megatron", model, tmp_path / "megatron", "--dtype", "bfloat16") == 0
    assert tool("megatron_to_hf", tmp_path / "megatron", tmp_path / "wide", "--dtype", "float32") == 0
    biases = {name for name in original if name.endswith("e_score_correction_bias")}
    assert biases
    expected = {name: tensor if name in biases else tensor.bfloat16().float() for name, tensor in original.items()}
    assert_same(tensors_of(tmp_path / "wide"), expected)
    assert AutoConfig.from_pretrained(tmp_path / "megatron").dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "wide").dtype == torch.float32
    assert tool("verify", model, tmp_path / "megatron") == 1
    assert tool("verify", model, tmp_path / "megatron", "--cast") == 0


def test_inspect_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    assert tool("inspect", model, "--tensors") == 0
    shown = capsys.readouterr().out
    tensors = tensors_of(model)
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert f"weights: {len(tensors)} tensors of float32, {elements:,} elements" in shown
    assert "model.norm.weight [64] float32" in shown and "tokenizer.json" in shown
