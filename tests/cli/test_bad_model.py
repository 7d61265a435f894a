"""Models that a run cannot begin with, through the command: one line, exit status 2, and no file of them touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import megarl_here, write_config

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def nan(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan


def untied(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3


def overflow(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for projection in ("q_proj", "k_proj"):
        tensors[f"model.layers.1.self_attn.{projection}.weight"] *= 1e30


def setting(**values: Any) -> Edit:
    return lambda config, tensors: config.update(values)


CASES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "NaN in a weight": (nan, ("model.layers.1.mlp.down_proj.weight", "NaN")),
    "another output layer": (untied, ("lm_head.weight", "model.embed_tokens.weight")),
    "hidden size 10^12": (setting(hidden_size=10**12), ("hidden_size", "config.json")),
    "hidden size that fits no memory": (setting(hidden_size=2**23, head_dim=16), ("config.json", "mis-shaped")),
    "one layer too many": (setting(num_hidden_layers=5), ("config.json", "layer")),
    "heads that do not divide": (setting(num_attention_heads=5), ("num_attention_heads",)),
    "rms_norm_eps a text": (setting(rms_norm_eps="small"), ("rms_norm_eps",)),
    "rope_theta negative": (setting(rope_theta=-1.0, rope_parameters=None), ("rope_theta",)),
    "vocabulary too small": (setting(vocab_size=200), ("vocab",)),
    "numbers that overflow": (overflow, ("the loss of the first update is",)),
}


@pytest.mark.parametrize("what", CASES)
def test_a_model_that_a_run_cannot_begin_with(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    edit, named = CASES[what]
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    config, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    edit(config, tensors)
    (model / "config.json").write_text(json.dumps(config))
    save_file(tensors, model / "model.safetensors")
    path = write_config(tmp_path, kind="sft", steps=2, evaluation={}, checkpoint={"every": 0})
    assert megarl_here("train", path, "--nproc", 2) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert all(name in line for name in named), line
    assert len(line) <= 300 + len("configuration error: ") and line.isprintable()
