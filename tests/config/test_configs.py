"""Every file in configs/ passes the cross-checks of its world size with its model's config.json, and is what its name says."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from megarl.config.checks import check
from megarl.config.load import load_config
from megarl.config.schema import Config, JsonlSource
from megarl.config.schema.algorithm import PRESETS
from megarl.config.stages import configs_of
from megarl.config.tasks import EVALUATION, TRAIN, tasks_of
from megarl.errors import ConfigError
from megarl.memory.statement import state_memory, state_relayout

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
CLUSTER = sorted([*(CONFIGS / "cluster").glob("*.yaml"), *CONFIGS.glob("*.yaml")])
STAGED = [path for path in CLUSTER if "\ncurriculum:" in path.read_text(encoding="utf-8")]
LAPTOP = sorted((CONFIGS / "laptop").glob("*.yaml"))
PUBLISHED = {folder.name: folder / "config.json" for folder in Path(__file__).with_name("models").iterdir()}
PUBLISHED["DeepSeek-V3-bf16"] = ROOT / "benchmarks" / "deepseek_v3" / "config.json"
TRAINING_GPUS = re.compile(r"^# .+ Cross-checked for (\d+) GPUs of 80 GB, not run\.\n")
QUICKSTART_MODEL = """{
  "model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
  "intermediate_size": 512, "vocab_size": 303, "max_position_embeddings": 2048, "tie_word_embeddings": true
}"""


def world_sizes(path: Path) -> list[int]:
    """A cluster file says its own; the others run on one core or two, those with context parallelism on four ranks."""
    if path not in CLUSTER:
        return [1, 2] if path in LAPTOP else [4] if path.parent.name == "long_context_laptop" else [2]
    match = TRAINING_GPUS.match(path.read_text(encoding="utf-8"))
    assert match, f"{path.name} does not begin with its number of GPUs"
    return [int(match[1])]


def published_model(config: Config) -> str:
    """Of a cluster config; of one that starts from a warm-up's result, of that warm-up."""
    if config.model.path.name != "hf":
        return config.model.path.name
    warm_up = load_config(CONFIGS / f"{config.model.path.parent.name}.yaml")
    assert warm_up.run_dir / "hf" == config.model.path
    return warm_up.model.path.name


def with_its_files(path: Path, *overrides: str) -> Config:
    """The config, and in the current folder the model and the rows that it reads."""
    config = load_config(path, overrides)
    folder = config.model.path
    folder.mkdir(parents=True)
    if path in CLUSTER:
        shutil.copy(PUBLISHED[published_model(config)], folder)
    else:
        (folder / "config.json").write_text(QUICKSTART_MODEL)
    (folder / "model.safetensors").touch()
    for source in (*(task.source for task in tasks_of(config.data.train, TRAIN)), *config.data.exclude):
        if isinstance(source, JsonlSource):
            source.path.parent.mkdir(parents=True, exist_ok=True)
            source.path.touch()
    return config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_file_passes_the_cross_checks(path: Path) -> None:
    config = with_its_files(path)
    for world_size in world_sizes(path):
        check(config, world_size)


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_a_layout_that_does_not_divide_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.parallel\.tp: tp 3 does not divide the model's num_attention_heads"):
        check(with_its_files(path, "policy.parallel.tp=3"), *world_sizes(path))


@pytest.mark.parametrize(
    "path", [path for path in (*CLUSTER, *LAPTOP) if not path.stem.endswith("_sft")], ids=lambda path: path.stem
)
def test_nothing_is_trained_on_that_is_evaluated_on(path: Path) -> None:
    config = load_config(path)
    assert config.evaluation.data is not None
    assert all(task.source in config.data.exclude for task in tasks_of(config.evaluation.data, EVALUATION))
    assert config.evaluation.every > 0


def test_every_preset_has_its_laptop_file() -> None:
    assert [path.stem for path in LAPTOP] == list(PRESETS)


@pytest.mark.parametrize("path", LAPTOP, ids=lambda path: path.stem)
def test_laptop_file_starts_from_what_the_quickstart_makes(path: Path) -> None:
    config, quickstart = load_config(path), load_config(CONFIGS / "quickstart" / "grpo.yaml")
    assert config.algorithm.preset == path.stem
    assert config.run_dir == Path("runs/laptop") / path.stem
    assert config.model == quickstart.model
    # what the warm-up has seen is what the quickstart leaves out
    assert config.evaluation.data == quickstart.evaluation.data
    assert config.data.template == quickstart.data.template


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.name)
def test_cluster_files_fit_their_gpus(path: Path) -> None:
    config, (ranks,) = with_its_files(path), world_sizes(path)
    stages = configs_of(config)
    for stage in stages:
        assert state_memory(stage, ranks, "cuda")[0].peak < 80e9
    for before, after in pairwise(stages):
        assert state_relayout(before, after, ranks, "cuda")[0].peak < 80e9


@pytest.mark.parametrize("path", STAGED, ids=lambda path: path.stem)
def test_stages_grow_in_prompts_and_context_parallelism(path: Path) -> None:
    stages = configs_of(load_config(path))
    assert len(stages) > 1
    for before, after in pairwise(stages):
        assert before.rollout.max_prompt_tokens < after.rollout.max_prompt_tokens
        assert before.policy.parallel.cp < after.policy.parallel.cp


@pytest.mark.parametrize("path", [path for path in STAGED if path.stem.startswith("qwenlong")], ids=lambda path: path.stem)
def test_settings_for_dapo_in_the_head_of_the_file(path: Path) -> None:
    settings = re.findall(r"--set (\S+)", path.read_text(encoding="utf-8").partition("\nkind:")[0])
    config = with_its_files(path, *settings)
    check(config, *world_sizes(path))
    algorithm = config.algorithm
    assert algorithm.dynamic_sampling and algorithm.aggregation == "token_mean"
    assert (algorithm.clip.low, algorithm.clip.high) == (0.2, 0.2)
    assert algorithm.reward_shaping.overlong_buffer * config.rollout.max_new_tokens == 1000
    assert algorithm.over_sampling * config.rollout.prompts_per_step == 384
    assert not algorithm.mask_truncated
