"""The command with model.rope_scaling: trained, resumed, exported, evaluated, converted, compared between layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megarl.cli import parity
from megarl.config.load import load_config
from megarl.config.schema import Config
from megarl.loop import launch
from megarl.loop.launch import launch_evaluation, launch_training
from megarl.weights.checkpoint import whole_checkpoints
from megarl.weights.files.convert import Options, hugging_face_to_megatron
from megarl.weights.files.model_folder import open_model
from runs import TIMEOUT, logged, megarl_here, write_config

SCALING = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 8}  # prompts are longer than 8 tokens
PARAMETERS = {**SCALING, "factor": 16.0, "rope_theta": 10000.0}

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def config_of(folder: Path, model: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"steps": 1, "model": {"path": str(model), "rope_scaling": SCALING}} | changes
    return write_config(folder, **settings)


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one step; ``config.yaml`` is beside it."""
    folder = tmp_path_factory.mktemp("scaled")
    launch_training(load_config(config_of(folder, workspace / "model")), num_ranks=2, resume=False)
    return folder / "run"


def test_the_export_has_the_scaling(run: Path) -> None:
    (folder,) = (run / "models").iterdir()
    for model in (folder, run / "hf"):
        config = AutoConfig.from_pretrained(model)
        assert config.rope_parameters == PARAMETERS
        assert config.max_position_embeddings == 128
    assert AutoModelForCausalLM.from_pretrained(run / "hf").model.rotary_emb.attention_scaling == pytest.approx(1.2772588722)
    kept = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert kept["rope_scaling"] == SCALING and not kept["path"].startswith(str(run))
    assert logged(run)[-1][1]["logprob_gap_max"] <= 1e-4  # embedded engine and trainer


def test_eval_scales_checkpoints_and_folders_alike(run: Path) -> None:
    expected = {name: value for name, value in logged(run)[-1][1].items() if name.startswith(("accuracy", "pass@"))}
    config = load_config(run.parent / "config.yaml")
    (checkpoint,) = whole_checkpoints(run / "checkpoints")
    for folder in (checkpoint, run / "hf"):
        assert launch_evaluation(config, folder, num_ranks=2) == expected
    assert open_model(checkpoint).config == next((run / "models").iterdir())


def test_resumed_with_the_folder_as_it_was(run: Path) -> None:
    (folder,) = (run / "models").iterdir()
    before = (folder.stat().st_ino, (folder / "config.json").stat().st_mtime_ns)
    config = load_config(run.parent / "config.yaml", ["steps=2"])
    launch_training(config, num_ranks=2, resume=True)
    assert [step for step, _ in logged(run)] == [0, 1, 2]
    assert [(path.stat().st_ino, (path / "config.json").stat().st_mtime_ns) for path in (run / "models").iterdir()] == [before]


def test_a_megatron_folder_as_the_model(run: Path, workspace: Path, tmp_path: Path) -> None:
    hugging_face_to_megatron(workspace / "model", tmp_path / "megatron", Options(None, 10**9), lambda *_: None)
    launch_training(load_config(config_of(tmp_path, tmp_path / "megatron")), num_ranks=2, resume=False)
    assert logged(tmp_path / "run") == logged(run)[:2]
    assert json.loads((tmp_path / "run" / "hf" / "config.json").read_text())["rope_parameters"] == PARAMETERS


def test_of_a_launchers_ranks_the_first_one_writes(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, which may be earlier, know where the folder will be; it is there before rank 0 meets them."""
    config = load_config(config_of(tmp_path, workspace / "model"))
    given: list[tuple[Path, bool]] = []

    def run_ranks(function: Any, arguments: tuple[Config, bool], *_: Any) -> None:
        path = arguments[0].model.path
        given.append((path, (path / "config.json").is_file()))

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    for rank in ("1", "0"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        launch_training(config, num_ranks=1, resume=False)
    assert given == [(given[0][0], False), (given[0][0], True)]


def test_commands_that_start_no_run_read_it_too(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity compares the scaled model, and all check the scaling."""
    path, compared = run.parent / "config.yaml", []

    class WatchedRun(parity.ParityRun):
        def __init__(self, config: Config, *arguments: Any) -> None:
            compared.append(AutoConfig.from_pretrained(config.model.path).rope_parameters)
            super().__init__(config, *arguments)

    monkeypatch.setattr(parity, "ParityRun", WatchedRun)
    assert megarl_here("parity", path, "--layouts", "tp=2", "--num-prompts", 1) == 0
    assert compared == [PARAMETERS]
    for command in (
        ("plan", "memory", path, "--world-size", 2),
        ("config", path, "--nproc", 2),
        ("parity", path, "--layouts", "tp=2"),
    ):
        capfd.readouterr()
        assert megarl_here(*command, "--set", "model.rope_scaling.factor=10") == 2
        assert "= 86 tokens exceed max_position_embeddings 80 of " in capfd.readouterr().err
