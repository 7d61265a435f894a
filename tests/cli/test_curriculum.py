"""Training in stages: models and optimizer states go from layout to layout, and a killed run goes on as if nothing had happened."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarl.cli.prompts import first_prompts
from megarl.config.load import load_config
from megarl.errors import CheckpointError, ConfigError, DataError, RankError
from megarl.loop import models
from megarl.loop.launch import launch_evaluation, launch_training
from runs import logged, megarl_here, write_config

RANKS = 4
ENDS = (2, 4, 6)  # steps after which the stages are over


def rows(size: int, seed: int) -> dict[str, Any]:
    options = {"min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 2}
    return {"type": "reasoning_gym", "task": "chain_sum", "size": size, "seed": seed, "options": options}


def write_staged_config(folder: Path, model: Path, **changes: Any) -> Path:
    """PPO in three stages; a critic that is elsewhere in each, and a policy that at last has two of the four ranks."""
    folder.mkdir(exist_ok=True)
    (folder / "model").symlink_to(model)
    stages: list[dict[str, Any]] = [
        {"name": "short", "steps": 2, "max_prompt_tokens": 74},
        {
            "name": "middle",
            "steps": 3,
            "max_prompt_tokens": 82,
            "promotion": {"plateau_window": 1, "plateau_gain": 9.0},
            "changes": {
                "policy": {"parallel": {"cp": 2, "pp": 2}},
                "critic": {"first_rank": 2, "parallel": {"tp": 1, "cp": 2}},
                "optimizer": {"learning_rate": 1e-2},
            },
        },
        {
            "name": "long",
            "steps": 2,
            "max_prompt_tokens": 90,
            "changes": {
                "policy": {"num_ranks": 2, "parallel": {"tp": 2}},
                "critic": {"parallel": {"tp": 1, "cp": 4}},
                "rollout": {"max_new_tokens": 8},
            },
        },
    ]
    sections = {
        "steps": 7,
        "algorithm": {"preset": "ppo", "kl": {"coefficient": 0.01}},
        "policy": {"parallel": {"tp": 1}},
        "critic": {"parallel": {"tp": 2}, "optimizer": {"learning_rate": 1e-3}},
        "data": {"template": "{prompt}\n", "train": rows(60, 2)},
        "evaluation": {"data": rows(20, 3), "temperature": 1.0, "every": 3},
        "checkpoint": {"every": 1, "keep": 9},
        "curriculum": {"retrospective_share": 0.5, "stages": stages},
    }
    return write_config(folder, **(sections | changes))


@pytest.fixture(scope="module")
def staged(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("staged")
    launch_training(load_config(write_staged_config(folder, workspace / "model")), num_ranks=RANKS, resume=False)
    return folder / "run"


def kept_until(run: Path, copy: Path, step: int) -> None:
    """The run as it stood when it had saved ``step``."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("hf*", "tensorboard", "checkpoints"))
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / f"step_{step:08d}").symlink_to(run / "checkpoints" / f"step_{step:08d}")


def assert_same_run(run: Path, expected: Path) -> None:
    assert logged(run) == logged(expected)
    for name in ("hf", "hf_critic"):
        assert (run / name / "model.safetensors").read_bytes() == (expected / name / "model.safetensors").read_bytes()


def test_stages_are_entered_by_rule_and_have_their_own_prompts(staged: Path) -> None:
    lines = dict(logged(staged))
    assert list(lines) == [0, 1, 2, 3, 4, 5, 6], "the middle stage ends a step early: its mean reward gained less than 9"
    assert [lines[step]["curriculum/stage"] for step in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    assert [lines[step]["curriculum/earlier_share"] for step in range(1, 7)] == [0, 0, 0.5, 0.5, 0.5, 0.5]
    report = json.loads((staged / "curriculum.json").read_text())
    assert sum(stage["num_prompts"] for stage in report["stages"]) == 60 and not report["leave_out"]
    ranges = [(0, 74), (74, 82), (82, 90)]
    for step in range(1, 7):
        stage = int(lines[step]["curriculum/stage"])
        written = [json.loads(line) for line in (staged / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]
        assert {line["response_tokens"] for line in written} <= set(range(9 if stage == 2 else 7))
        own = sum(ranges[stage][0] < line["prompt_tokens"] <= ranges[stage][1] for line in written)
        assert own == (len(written) if stage == 0 else len(written) / 2)
        assert all(line["prompt_tokens"] <= ranges[stage][1] for line in written)
    # held-out prompts: every third step, and at the end of each stage
    assert [step for step, metrics in lines.items() if "accuracy@short" in metrics] == [0, 2, 3, 4, 6]
    assert [step for step, metrics in lines.items() if "accuracy@long" in metrics] == [6]
    # the stage's own learning rate on the run's cosine, as transformers has it: behind a warm-up of 1 of 7 step k is at (k - 2) / 6
    rates = [lines[step]["learning_rate"] for step in range(1, 7)]
    cosine = [(1 + math.cos(math.pi * (step - 2) / 6)) / 2 for step in range(3, 7)]
    expected = [0.0, 2e-2, *(rate * share for rate, share in zip((1e-2, 1e-2, 2e-2, 2e-2), cosine, strict=True))]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_killed_after_a_stage_equals_uninterrupted(staged: Path, tmp_path: Path) -> None:
    """What was moved between layouts in the first run is read from the checkpoint into the next stage's layout."""
    kept_until(staged, tmp_path / "run", ENDS[0])
    config = load_config(staged.parent / "config.yaml", [f"run_dir={tmp_path / 'run'}"])
    launch_training(config, num_ranks=RANKS, resume=True)
    assert_same_run(tmp_path / "run", staged)


def test_killed_while_models_change_layout_equals_uninterrupted(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed within the second stage; then SIGKILL of one rank between the weights and the optimizer state of the re-layout."""
    kept_until(staged, tmp_path / "run", ENDS[1] - 1)
    config = load_config(staged.parent / "config.yaml", [f"run_dir={tmp_path / 'run'}"])

    class Killed(models.OptimizerTransfer):
        def move(self) -> None:
            if dist.get_rank() == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            super().move()

    with monkeypatch.context() as patch, pytest.raises(RankError, match=r"rank 2 of \d .* was killed by SIGKILL"):
        patch.setattr(models, "OptimizerTransfer", Killed)
        launch_training(config, num_ranks=RANKS, resume=True)
    assert logged(tmp_path / "run")[-1][0] == ENDS[1]
    launch_training(config, num_ranks=RANKS, resume=True)
    assert_same_run(tmp_path / "run", staged)


def test_evaluation_of_the_last_checkpoint_is_the_runs_own(staged: Path) -> None:
    """Of all stages' held-out prompts, those that are too long for the last stage left out as the run leaves them out."""
    checkpoint = staged / "checkpoints" / "step_00000006"
    evaluated = launch_evaluation(load_config(staged.parent / "config.yaml"), checkpoint, num_ranks=RANKS)
    names = ("accuracy", "accuracy@short", "accuracy@middle", "accuracy@long")
    assert {name: evaluated[name] for name in names} == {name: dict(logged(staged))[6][name] for name in names}
    shorter = load_config(staged.parent / "config.yaml", ["curriculum.stages.2.max_prompt_tokens=84"])
    assert launch_evaluation(shorter, checkpoint, num_ranks=RANKS)["accuracy@short"] == evaluated["accuracy@short"]


def test_responses_in_flight_go_on_in_the_next_stage(workspace: Path, tmp_path: Path) -> None:
    """Generation beside training: every group that a stage began is trained on once, some of them in the stage after."""
    rollout = {
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "embedded": {"threads": 1},
        "asynchronous": {"max_staleness": 1},
    }
    stages = [{"name": name, "steps": 2, "max_prompt_tokens": size} for name, size in (("short", 74), ("long", 90))]
    changes = {"steps": 4, "curriculum": {"stages": stages}, "rollout": rollout, "evaluation": {}, "algorithm": {}, "critic": None}
    path = write_staged_config(tmp_path, workspace / "model", **changes)
    launch_training(load_config(path), num_ranks=1, resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "groups.jsonl").read_text().splitlines()]
    assert all(len(line["trained"]) == 4 and not line["dropped"] for line in lines)
    tickets = [ticket for line in lines for ticket, _ in line["trained"]]
    assert len(set(tickets)) == 16 and set(tickets) <= set(range(20)), "one step's groups more were begun at most"
    written = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000003.jsonl").read_text().splitlines()]
    assert min(line["prompt_tokens"] for line in written) <= 74, "the first groups of the second stage were begun in the first"


def test_parity_is_of_the_last_stage(workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_staged_config(tmp_path / "parity", workspace / "model")
    lengths = [len(tokens) for tokens in first_prompts(load_config(path), 4)]
    assert len(lengths) == 4 and all(82 < length <= 90 for length in lengths)
    assert megarl_here("parity", path, "--layouts", "tp=2", "--num-prompts", 2) == 0
    assert "ok" in capfd.readouterr().out
    # the last stage's responses, of up to 8 tokens, do not fit beside its prompts
    assert megarl_here("parity", path, "--layouts", "tp=2,max_tokens_per_micro_batch=97") == 2
    assert "rollout.max_prompt_tokens 90 + rollout.max_new_tokens 8 = 98 tokens" in capfd.readouterr().err


def test_refusals_once_the_prompts_or_a_checkpoint_are_known(
    staged: Path, finished: Path, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_staged_config(tmp_path / "empty", workspace / "model", data={"template": "{prompt} " * 9, "train": rows(9, 2)})
    with pytest.raises(DataError, match=r"^curriculum.stages.0.max_prompt_tokens: no prompt of data.train has 1 to 74 tokens"):
        launch_training(load_config(path), num_ranks=RANKS, resume=False)
    # another curriculum, or none, in the checkpoint
    kept_until(staged, tmp_path / "run", 3)
    run_dir = f"run_dir={tmp_path / 'run'}"
    other = load_config(staged.parent / "config.yaml", [run_dir, "curriculum.stages.1.name=other"])
    with pytest.raises(CheckpointError, match=r"in stage 1, 'middle', of its curriculum and this run has the stages short, other"):
        launch_training(other, num_ranks=RANKS, resume=True)
    kept_until(finished, tmp_path / "plain", 3)
    staged_config = load_config(staged.parent / "config.yaml", [f"run_dir={tmp_path / 'plain'}"])
    with pytest.raises(ConfigError, match=r"--resume: algorithm.advantage is gae, and the run in .* has group_mean_std"):
        launch_training(staged_config, num_ranks=RANKS, resume=True)
    assert megarl_here("train", path, "--nproc", 3, "--run-dir", tmp_path / "three") == 2
    assert "curriculum.stages.1 (middle)" in capfd.readouterr().err
