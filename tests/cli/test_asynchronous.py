"""Asynchronous and partial runs from start to end: how old their tokens are, and where every prompt is when they are killed."""

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.config.load import load_config
from megarl.data.sampler import build_prompt_source
from megarl.data.template import load_tokenizer
from megarl.errors import CheckpointError, RewardError
from megarl.loop.launch import launch_training
from megarl.weights.checkpoint import whole_checkpoints
from runs import TIMEOUT, logged, write_config

PROMPTS_PER_STEP = 3
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def write(workspace: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a run on the workspace's model, whose responses are long beside its steps."""
    (tmp_path / "model").symlink_to(workspace / "model")

    def write(*, rollout: dict[str, Any], **changes: Any) -> Path:
        settings = {
            "prompts_per_step": PROMPTS_PER_STEP,
            "samples_per_prompt": 3,
            "max_prompt_tokens": 80,
            "max_new_tokens": 60,
            "embedded": {"threads": 1, "batch_size": 6},
        }
        values = {
            "policy": {},
            "algorithm": {"preset": "grpo", "sampler_correction": {"method": "tis"}, "kl": {"place": "none", "coefficient": 0.0}},
            "evaluation": {},
            "checkpoint": {"every": 1, "export": False},
            "observe": {"tensorboard": False, "rollouts_per_step": 64},
        }
        return write_config(tmp_path, rollout=settings | rollout, **(values | changes))

    return write


def train(path: Path, run_dir: Path, *, resume: bool = False, steps: int | None = None) -> None:
    overrides = [f"run_dir={run_dir}"] + ([] if steps is None else [f"steps={steps}"])
    launch_training(load_config(path, overrides), num_ranks=1, resume=resume)


def groups_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "groups.jsonl").read_text().splitlines()]


def sampled_versions(run_dir: Path, step: int) -> list[list[int]]:
    """The weight versions of each response that the step trained on."""
    lines = (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line)["weight_versions"] for line in lines]


def saved_step(run_dir: Path) -> int:
    """Steps done at the newest whole checkpoint."""
    return int(whole_checkpoints(run_dir / "checkpoints")[-1].name.removeprefix("step_"))


def assert_every_prompt_is_accounted_for(path: Path, run_dir: Path) -> int:
    """Trained, dropped or outstanding in the newest checkpoint: each ticket once, each with its prompt; the number of tickets."""
    checkpoint = whole_checkpoints(run_dir / "checkpoints")[-1]
    store = json.loads((checkpoint / "outstanding.json").read_text())["outstanding"]
    num_begun = store["num_begun"]
    names = [(group["ticket"], group["prompt_id"]) for group in store["groups"]] + [tuple(name) for name in store["dropped"]]
    for line in groups_of(run_dir):
        if line["step"] <= saved_step(run_dir):
            names += [tuple(name) for name in line["trained"] + line["dropped"]]
    config = load_config(path)
    prompts = build_prompt_source(config, load_tokenizer(config.model.path)).take(num_begun)
    assert sorted(names) == [(ticket, prompt.prompt_id) for ticket, prompt in enumerate(prompts)]
    return num_begun


@pytest.mark.parametrize("on_update", ["continue", "finish"])
def test_no_token_is_older_than_the_bound(write: Callable[..., Path], tmp_path: Path, on_update: str) -> None:
    rollout = {"asynchronous": {"max_staleness": 2, "on_update": on_update}, "max_new_tokens": 160}
    path = write(rollout=rollout, steps=6)
    for attempt in range(4):  # whether an update falls between two tokens of a response is a matter of time
        run_dir, spans = tmp_path / f"run{attempt}", 0
        train(path, run_dir)
        for step in range(1, 7):
            responses = sampled_versions(run_dir, step)
            assert len(responses) == PROMPTS_PER_STEP * 3
            oldest = max(0, step - 1 - 2)
            assert all(oldest <= version <= step - 1 for versions in responses for version in versions), (step, responses)
            spans += sum(len(versions) > 1 for versions in responses)
        metrics = [values for _, values in logged(run_dir)]
        assert max(one["staleness_max"] for one in metrics) <= 2 and any(one["staleness_mean"] > 0 for one in metrics)
        # only tokens of the current weights are compared, and those agree
        assert all(one["logprob_gap_max"] <= 1e-5 for one in metrics)
        assert assert_every_prompt_is_accounted_for(path, run_dir) == 6 * PROMPTS_PER_STEP
        if spans > 0 or on_update == "finish":
            break
    assert (spans > 0) == (on_update == "continue")


def start_and_kill(path: Path, run_dir: Path, moment: random.Random, *, resume: bool) -> None:
    """Go on with a run, and kill all of it at a random moment after its next checkpoint."""
    num_before = len(groups_of(run_dir)) if resume else 0
    run = multiprocessing.get_context("fork").Process(target=train, args=(path, run_dir), kwargs={"resume": resume})
    run.start()
    deadline = time.monotonic() + TIMEOUT
    num_steps, delay = moment.randint(1, 2), moment.uniform(0, 0.8)
    while not whole_checkpoints(run_dir / "checkpoints") or len(groups_of(run_dir)) < num_before + num_steps:
        assert run.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)  # this is the random moment
    processes = psutil.Process(run.pid).children(recursive=True)
    for process in (run, *processes):
        with suppress(psutil.NoSuchProcess):  # a scorer's worker that ended in between
            process.kill()
    run.join(TIMEOUT)
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_killed_at_any_moment_every_prompt_is_accounted_for_once(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(rollout={"asynchronous": {"max_staleness": 1}}, steps=200)
    moment, run_dir = random.Random(5), tmp_path / "run"
    for attempt in range(3):
        start_and_kill(path, run_dir, moment, resume=attempt > 0)
        num_begun = assert_every_prompt_is_accounted_for(path, run_dir)
        assert num_begun == (saved_step(run_dir) + 2) * PROMPTS_PER_STEP
    steps = saved_step(run_dir) + 3
    train(path, run_dir, resume=True, steps=steps)
    assert assert_every_prompt_is_accounted_for(path, run_dir) == steps * PROMPTS_PER_STEP
    lines = groups_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    trained = [ticket for line in lines for ticket, _ in line["trained"]]
    assert sorted(trained) == list(range(steps * PROMPTS_PER_STEP))  # none twice, none lost, none left over


def test_partial_rollouts_resume_bit_for_bit(write: Callable[..., Path], tmp_path: Path) -> None:
    """Responses of up to four budgets; a run of six steps, and one that goes on from its third."""
    rollout = {"partial": {"step_token_budget": 15}, "stop_token_ids": list(range(40, 46))}
    checkpoint = {"every": 1, "keep": 6, "export": False}
    path = write(rollout=rollout, steps=6, optimizer={"learning_rate": 2e-2}, checkpoint=checkpoint)
    train(path, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("step_0000000[456]", "rollouts"))
    train(path, tmp_path / "parts", resume=True)
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert whole == parts
    assert groups_of(tmp_path / "whole") == groups_of(tmp_path / "parts")
    assert assert_every_prompt_is_accounted_for(path, tmp_path / "whole") > 6 * PROMPTS_PER_STEP  # some still wait
    spans = [versions for step in range(1, 7) for versions in sampled_versions(tmp_path / "whole", step) if len(versions) > 1]
    assert spans and all(versions == list(range(versions[0], versions[-1] + 1)) for versions in spans)
    assert max(metrics["staleness_max"] for _, metrics in whole) >= 1
    with pytest.raises(CheckpointError, match=r"begun and not yet trained on; resume with the rollout\.asynchronous or rollout\.p"):
        launch_training(load_config(path, ["rollout.partial=null", f"run_dir={tmp_path / 'parts'}"]), num_ranks=1, resume=True)


def test_a_scorer_that_fails_in_the_background_ends_the_run(write: Callable[..., Path], tmp_path: Path) -> None:
    scorers = [{"type": "python", "function": "failing_rewards:fails_later"}]
    path = write(rollout={"asynchronous": {}}, steps=50, rewards={"scorers": scorers})
    with pytest.raises(RewardError, match="no more scores"):
        train(path, tmp_path / "run")
    assert len(groups_of(tmp_path / "run")) < 10
    assert [process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE] == []
