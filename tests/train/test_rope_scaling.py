"""RoPE scaling from the run's config against transformers' models of config.json files written by hand."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megarl.cli.parity import ParityRun
from megarl.config.schema import Config, EmbeddedEngineConfig
from megarl.engines.embedded import EmbeddedEngine
from megarl.errors import ConfigError
from megarl.families.registry import MODEL_TYPES, read_architecture
from megarl.models.rope import rotary_frequencies, softmax_scale
from megarl.models.scaled_folder import with_scaled_model
from tiny import YARN as LATENT_YARN
from tiny import tiny_config, write_tiny_model
from tiny_rollout import exported_weights, generate_all, make_tiny_model, sampling, weight_shapes, worst_gap

ORIGINAL, POSITIONS = 16, 64  # of pretraining, and of the scaled model
PROMPTS = [list(range(3, 43)), [1, 2, 3], list(range(60, 90))]
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": ORIGINAL},
    "linear": {"rope_type": "linear", "factor": 4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": ORIGINAL,
    },
}
THETA = 5000.0


def by_hand(source: Path, folder: Path, scaling: dict[str, Any]) -> PreTrainedModel:
    """transformers' float32 model of the folder whose config.json has the scaling as transformers 5 writes it."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] = scaling | {"rope_theta": THETA, "factor": float(scaling["factor"])}
    values["max_position_embeddings"] = POSITIONS
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(values))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def short_model(folder: Path, family: str, **changes: Any) -> Path:
    """A model of 16 positions."""
    rope = {"rope_type": "default", "rope_theta": THETA}
    write_tiny_model(folder, family, max_position_embeddings=ORIGINAL, rope_parameters=rope, **changes)
    return folder


def scaled(folder: Path, source: Path, scaling: dict[str, Any], **changes: Any) -> Config:
    config = tiny_config(source, model={"path": str(source), "rope_scaling": scaling}, **changes)
    return with_scaled_model(config, folder, writes=True)


@pytest.mark.parametrize(("family", "rope_type"), [("llama", "llama3"), ("qwen2", "yarn"), ("olmo2", "linear")])
def test_logprobs_and_gradients_beyond_the_original_length(tmp_path: Path, family: str, rope_type: str) -> None:
    source, scaling = short_model(tmp_path / "model", family), SCALINGS[rope_type]
    config = scaled(tmp_path, source, scaling, kind="sft", rollout={"samples_per_prompt": 2, "max_new_tokens": 17})
    run = ParityRun(config, PROMPTS, tmp_path)
    packed, _ = torch.load(tmp_path / "batch.pt", weights_only=False)
    model = by_hand(source, tmp_path / "by_hand", scaling)
    expected, total = torch.zeros(packed.token_ids.numel()), torch.zeros((), dtype=torch.float64)
    for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        tokens, answered = packed.token_ids[start:stop], packed.loss_mask[start:stop]
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        expected[start + 1 : stop] = (logprobs * answered[1:]).detach()
        total = total + (logprobs * answered[1:]).double().sum()
    (-total / packed.loss_mask.sum()).backward()
    assert max(packed.cu_seqlens.diff()) >= 3 * ORIGINAL
    assert (run.reference.outputs["policy"] - expected).abs().max() <= 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gap = (run.reference.gradients[name].double() - parameter.grad.double()).norm() / parameter.grad.norm()
        assert gap <= 1e-5, (name, gap)


@pytest.mark.parametrize("rope_type", list(SCALINGS))
@pytest.mark.parametrize("family", [family for family in MODEL_TYPES if family not in ("deepseek_v3", "phi3")])
def test_frequencies_of_every_family(tmp_path: Path, family: str, rope_type: str) -> None:
    source = short_model(tmp_path / "model", family, num_hidden_layers=2)
    config = scaled(tmp_path, source, SCALINGS[rope_type])
    rotary = by_hand(source, tmp_path / "by_hand", SCALINGS[rope_type]).model.rotary_emb
    frequencies, attention_factor = rotary_frequencies(read_architecture(config.model.path))
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(rotary.attention_scaling)


def test_latent_attention_has_the_temperature_too(tmp_path: Path) -> None:
    scaling = {name: value for name, value in LATENT_YARN.items() if name != "rope_theta"} | {
        "original_max_position_embeddings": ORIGINAL
    }
    source = short_model(tmp_path / "model", "deepseek_v3", num_hidden_layers=2)
    config = scaled(tmp_path, source, scaling)
    model = by_hand(source, tmp_path / "by_hand", scaling)
    architecture = read_architecture(config.model.path)
    frequencies, attention_factor = rotary_frequencies(architecture)
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert softmax_scale(architecture, attention_factor) == pytest.approx(model.model.layers[0].self_attn.scaling)


@pytest.mark.parametrize("rope_type", list(SCALINGS))
def test_the_embedded_engine_reads_the_same_config_json(tmp_path: Path, rope_type: str) -> None:
    source, weights = tmp_path / "model", make_tiny_model(0, tmp_path / "model")
    values = json.loads((source / "config.json").read_text())
    values |= {"max_position_embeddings": ORIGINAL, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    (source / "config.json").write_text(json.dumps(values))
    config = scaled(tmp_path, source, SCALINGS[rope_type])
    prompts = [tuple(range(7, 57)), (1, 2, 3)]

    async def sampled() -> Any:
        engine = EmbeddedEngine(config.model.path, torch.float32, EmbeddedEngineConfig(threads=1), weight_shapes(weights))
        await engine.start()
        try:
            await engine.update_weights(exported_weights(weights), 0)
            return await generate_all(engine, prompts, sampling())
        finally:
            await engine.close()

    groups = asyncio.run(sampled())
    assert worst_gap(by_hand(source, tmp_path / "by_hand", SCALINGS[rope_type]), prompts, groups, 1.0) <= 1e-5
    assert worst_gap(weights, prompts, groups, 1.0) > 1e-2


def test_the_folder_is_made_once_and_repaired(tmp_path: Path) -> None:
    source = short_model(tmp_path / "model", "llama", num_hidden_layers=2)
    (source / ".metadata").write_text("hidden files count too")
    (source / "extra").mkdir()
    before = (source / "config.json").read_bytes()
    config = scaled(tmp_path / "run", source, SCALINGS["yarn"])
    folder = config.model.path
    assert config.model.rope_scaling is None and folder.parent == tmp_path / "run" / "models"
    names = {file.name for file in source.iterdir()}
    assert {file.name for file in folder.iterdir()} == names
    for name in names - {"config.json"}:
        assert (folder / name).is_symlink() and (folder / name).resolve() == (source / name).resolve()
    assert (source / "config.json").read_bytes() == before
    values, own = json.loads((folder / "config.json").read_text()), json.loads(before)
    parameters = SCALINGS["yarn"] | {"rope_theta": THETA}
    assert values["rope_parameters"] == parameters and values["max_position_embeddings"] == POSITIONS
    assert isinstance(values["rope_parameters"]["factor"], float)  # a whole number kills vLLM with linear scaling
    assert values["rope_scaling"] == SCALINGS["yarn"] and values["rope_theta"] == THETA  # what transformers 4 reads
    changed = {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"}
    assert {key: values[key] for key in values.keys() - changed} == {key: own[key] for key in own.keys() - changed}

    def identity() -> tuple[int, int]:
        return folder.stat().st_ino, (folder / "config.json").stat().st_mtime_ns

    made = identity()
    assert scaled(tmp_path / "run", source, SCALINGS["yarn"] | {"factor": 4.0}).model.path == folder
    assert identity() == made  # 4 and 4.0 are the same scaling; the folder is left alone
    good = (folder / "config.json").read_bytes()
    (folder / "config.json").write_text("{}")
    scaled(tmp_path / "run", source, SCALINGS["yarn"])
    assert (folder / "config.json").read_bytes() == good
    (folder / "stale").touch()
    shutil.copytree(folder, folder.with_name(folder.name + ".partial"), symlinks=True)  # as after a kill
    scaled(tmp_path / "run", source, SCALINGS["yarn"])
    assert (folder / "config.json").read_bytes() == good and {file.name for file in folder.iterdir()} == names
    (source / "tokenizer.json").touch()
    scaled(tmp_path / "run", source, SCALINGS["yarn"])
    assert (folder / "tokenizer.json").is_symlink()
    shutil.rmtree(source / "extra")
    scaled(tmp_path / "run", source, SCALINGS["yarn"])
    assert not os.path.lexists(folder / "extra")
    others = {scaled(tmp_path / "run", source, SCALINGS[name]).model.path for name in ("linear", "llama3")}
    assert len(others | {folder}) == 3 and {path.name for path in folder.parent.iterdir()} == {
        path.name for path in others | {folder}
    }


def test_only_the_preparing_process_writes(tmp_path: Path) -> None:
    source = short_model(tmp_path / "model", "llama", num_hidden_layers=1)
    config = tiny_config(source, model={"path": str(source), "rope_scaling": SCALINGS["linear"]})
    waiting = with_scaled_model(config, tmp_path / "run", writes=False)
    assert not (tmp_path / "run").exists()
    assert with_scaled_model(config, tmp_path / "run", writes=True) == waiting
    assert waiting.model.path.is_dir()
    plain = tiny_config(source)
    assert with_scaled_model(plain, tmp_path / "run", writes=True) is plain
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^model.rope_scaling: .*file/models/linear-\w{12} cannot be made .*; choose another"):
        with_scaled_model(config, tmp_path / "file", writes=True)
