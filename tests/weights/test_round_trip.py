"""Hugging Face to Megatron and back as a folder, random weights, and every kind of broken input refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megarl.cli.parity import parse_layout, with_layout
from megarl.config.schema import Config
from megarl.errors import WeightsError
from megarl.families.registry import MODEL_TYPES
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.weights import export
from megarl.weights.export import write_hugging_face_folder
from tiny import tiny_config, write_tiny_model


def export_policy(config: Config, output: Path) -> None:
    policy = Policy(config, total_updates=1)
    tensors = policy.hugging_face_tensors()
    if is_main_rank():
        write_hugging_face_folder(tensors, config.model.path, config.model.path, output)
    else:
        list(tensors)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_the_exported_folder_is_the_model(tmp_path: Path, family: str) -> None:
    model = write_tiny_model(tmp_path / "model", family)
    config, num_ranks = with_layout(tiny_config(tmp_path / "model"), parse_layout("tp=2,pp=2,sequence_parallel=true"))
    run_local_ranks(export_policy, (config, tmp_path / "out"), num_ranks, 60)
    original, exported = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


LAYOUTS = ["", "tp=2", "tp=4,pp=2", "pp=4", "pp=2,vpp=2", "tp=2,pp=2,vpp=2,cp=2", "dp=2"]


def test_random_start_is_the_same_in_every_layout(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "qwen2")
    start = tiny_config(tmp_path / "model", model={"path": str(tmp_path / "model"), "init": "random"})
    exports = []
    for layout in LAYOUTS:
        config, num_ranks = with_layout(start, parse_layout(layout))
        run_local_ranks(export_policy, (config, tmp_path / "out"), num_ranks, 60)
        exports.append(load_file(tmp_path / "out" / "model.safetensors"))
    for exported in exports[1:]:
        assert all(torch.equal(exported[name], tensor) for name, tensor in exports[0].items())
    weight = exports[0]["model.layers.0.mlp.up_proj.weight"]
    assert abs(weight.std().item() - 0.02) < 0.002


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    run_local_ranks(export_policy, (tiny_config(tmp_path / "model"), tmp_path / "out"), 1, 60)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    original = load_file(tmp_path / "model" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())
    # and our own reader takes the shards
    config = tiny_config(tmp_path / "out")
    run_local_ranks(export_policy, (config, tmp_path / "again"), 1, 60)


def breaks(model: Path, what: str) -> str:
    """Damage a saved model; returns what the error must name."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    match what:
        case "no file":
            file.unlink()
            return "no *.safetensors"
        case "truncated":
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])
            return "truncated or corrupt"
        case "garbage":
            file.write_bytes(b"\xff" * 1000)
            return "truncated or corrupt"
        case "missing":
            del tensors["model.layers.3.mlp.up_proj.weight"]
            save_file(tensors, file)
            return "missing: model.layers.3.mlp.up_proj.weight"
        case "extra":
            save_file(tensors | {"model.layers.4.mlp.up_proj.weight": torch.zeros(1)}, file)
            return "extra: model.layers.4.mlp.up_proj.weight"
        case "shape":
            save_file(tensors | {"model.norm.weight": torch.zeros(3)}, file)
            return "model.norm.weight is [3], config.json says [64]"
        case "index names a missing file":
            file.unlink()
            index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
            return "model-00001-of-00001.safetensors is named by the index and missing"
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize("what", ["no file", "truncated", "garbage", "missing", "extra", "shape", "index names a missing file"])
def test_broken_weights_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    expected = breaks(tmp_path / "model", what)
    with pytest.raises(WeightsError) as error:
        run_local_ranks(export_policy, (tiny_config(tmp_path / "model"), tmp_path / "out"), 2, 60)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
