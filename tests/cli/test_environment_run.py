"""The command with an environment in worker processes: training, its evaluation, ``megarl eval``, twice the same."""

import json
from pathlib import Path

import pytest

from runs import logged, megarl_here, write_config

pytestmark = pytest.mark.timeout(300)

ENVIRONMENT = {
    # a random model says something with a letter or figure in most turns: that is a call, and its value mostly "error"
    "type": "calculator",
    "options": {"pattern": "([0-9A-Za-z])"},
    "observation_template": "\n{observation}\n",
    "max_turns": 3,
}
ROLLOUT = {
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "max_prompt_tokens": 80,
    "max_new_tokens": 40,
    "stop_token_ids": list(range(2, 258, 4)),
    "embedded": {"threads": 1},
    "environment": ENVIRONMENT,
}


@pytest.fixture(scope="module")
def run_dir(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    write_config(folder, steps=2, model={"path": str(workspace / "model")}, rollout=ROLLOUT)
    assert megarl_here("train", folder / "config.yaml", "--nproc", 2) == 0
    return folder / "run"


def test_trainer_and_sampler_agree_on_trajectories_of_several_turns(run_dir: Path) -> None:
    for step, metrics in logged(run_dir):
        if step > 0:
            assert metrics["logprob_gap_max"] <= 1e-5
            assert 1 < metrics["turns_mean"] <= metrics["turns_max"] == 3
            assert 0 < metrics["environment_token_share"] < 1
            assert 0 < metrics["out_of_turns_share"] <= 1
            assert metrics["score_environment"] == metrics["rollout/environment_failures"] == 0
            assert metrics["gradient_norm"] > 0


def test_rollouts_say_who_said_what(run_dir: Path) -> None:
    for name in ("step_000001.jsonl", "evaluation_000002.jsonl"):
        lines = [json.loads(line) for line in (run_dir / "rollouts" / name).read_text().splitlines()]
        assert max(len(line["turns"]) for line in lines) >= 3
        for line in lines:
            speakers = [speaker for turn in line["turns"] for speaker in turn]
            assert speakers == ["policy", "environment", "policy", "environment", "policy", "environment"][: len(speakers)]
            *_, last = [text for turn in line["turns"] for speaker, text in turn.items() if speaker == "policy"]
            assert line["response"] == last
            assert (line["environment_tokens"] > 0) == (speakers.count("policy") > 1)


def test_the_same_run_again_is_equal_bit_for_bit(run_dir: Path, tmp_path: Path) -> None:
    assert megarl_here("train", run_dir.parent / "config.yaml", "--nproc", 2, "--run-dir", tmp_path / "run") == 0
    assert logged(tmp_path / "run") == logged(run_dir)
    for name in ("hf/model.safetensors", "rollouts/step_000002.jsonl", "rollouts/evaluation_000000.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (run_dir / name).read_bytes()


def test_eval_plays_episodes_too(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The accuracy of the last evaluation, which only a run with the same episodes has."""
    config, checkpoint = run_dir.parent / "config.yaml", run_dir / "checkpoints" / "step_00000002"
    assert megarl_here("eval", config, "--checkpoint", checkpoint, "--nproc", 2) == 0
    expected = {name: value for name, value in logged(run_dir)[-1][1].items() if name in ("accuracy", "pass@4")}
    printed = capfd.readouterr().out
    assert all(f"{name}: {value:.4f}" in printed for name, value in expected.items()), printed
