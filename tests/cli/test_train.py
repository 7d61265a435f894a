"""The megarl command from start to end: killed, resumed, evaluated, compared between layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from megarl.config.load import load_config
from megarl.data.sampler import build_sft_source
from megarl.data.template import SFTExample
from megarl.errors import CheckpointError
from megarl.loop.launch import launch_evaluation, launch_training
from megarl.weights.checkpoint import whole_checkpoints
from runs import (
    assert_same_run,
    copy_of_interrupted,
    logged,
    megarl,
    megarl_here,
    processes_naming,
    start_and_kill,
    write_config,
)
from tiny import write_tiny_model

RATES = ("accuracy", "pass@2", "pass@4")


def test_the_run_folder_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "tensorboard",
        "hf",
    }
    assert [path.name for path in whole_checkpoints(finished / "checkpoints")] == ["step_00000003", "step_00000004"]
    assert list((finished / "tensorboard").iterdir())
    assert sorted(path.name for path in (finished / "rollouts").iterdir()) == [
        *(f"evaluation_{step:06d}.jsonl" for step in (0, 4)),
        *(f"step_{step:06d}.jsonl" for step in range(1, 5)),
    ]
    steps = [step for step, _ in logged(finished)]
    assert steps == [0, 1, 2, 3, 4]
    assert all(metrics["gradient_norm"] > 0 and metrics["logprob_gap_max"] <= 1e-5 for _, metrics in logged(finished)[1:])
    assert load_config(finished / "config.yaml").run_dir == finished
    assert not processes_naming(finished.parent)


def test_killed_with_all_its_processes_and_resumed_equals_uninterrupted(finished: Path, tmp_path: Path) -> None:
    config = finished.parent / "config.yaml"
    assert 1 <= start_and_kill(config, tmp_path / "run", seed=0, parent_only=False) < 4
    result = megarl("train", config, "--nproc", 2, "--run-dir", tmp_path / "run", "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", finished)


def test_a_killed_parent_takes_its_ranks_along_and_asynchronous_checkpoints_resume(workspace: Path, tmp_path: Path) -> None:
    checkpoint = {"every": 1, "asynchronous": True}
    policy = {"parallel": {"pp": 2}}
    (tmp_path / "model").symlink_to(workspace / "model")
    path = write_config(tmp_path, steps=16, policy=policy, checkpoint=checkpoint)
    launch_training(load_config(path), num_ranks=2, resume=False)
    assert 1 <= start_and_kill(path, tmp_path / "killed", seed=1, parent_only=True) < 16
    launch_training(load_config(path, [f"run_dir={tmp_path / 'killed'}"]), num_ranks=2, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "num_ranks"),
    [
        (["policy.parallel.tp=1"], 2),
        # rank 0 has the reference alone: what it exports, evaluates and gives to the engine comes from the others
        (["policy.first_rank=1", "reference.num_ranks=1"], 3),
    ],
)
def test_rl_goes_on_in_another_layout(finished: Path, tmp_path: Path, overrides: list[str], num_ranks: int) -> None:
    copy_of_interrupted(finished, tmp_path / "run", 3)
    config = load_config(finished.parent / "config.yaml", [*overrides, f"run_dir={tmp_path / 'run'}"])
    launch_training(config, num_ranks=num_ranks, resume=True)
    (*kept, (step, metrics)) = logged(tmp_path / "run")
    assert (kept, step) == (logged(finished)[:4], 4)
    assert metrics["logprob_gap_max"] <= 1e-5
    # the same weights answer the same prompts, so the step is the same up to the order of sums
    assert (metrics["loss"], metrics["gradient_norm"]) == pytest.approx(
        tuple(logged(finished)[4][1][name] for name in ("loss", "gradient_norm")), rel=1e-3
    )
    if num_ranks == 3:
        last = launch_evaluation(config, whole_checkpoints(tmp_path / "run" / "checkpoints")[-1], num_ranks=3)
        assert last == {name: metrics[name] for name in RATES}
        exported = launch_evaluation(config, tmp_path / "run" / "hf", num_ranks=3)
        assert exported == last


def test_optimizer_state_of_the_other_kind_is_refused(finished: Path, tmp_path: Path) -> None:
    copy_of_interrupted(finished, tmp_path / "run", 3)
    overrides = ["policy.parallel.distributed_optimizer=false", f"run_dir={tmp_path / 'run'}"]
    expected = r"^policy\.parallel\.distributed_optimizer: is False, .* saved with True, can be read with True only; set it to"
    with pytest.raises(CheckpointError, match=expected):
        launch_training(load_config(finished.parent / "config.yaml", overrides), num_ranks=2, resume=True)


def test_what_a_method_carries_from_step_to_step_is_resumed(workspace: Path, tmp_path: Path) -> None:
    """The adapted KL coefficient, with mini-batches, KL in the reward and whitening."""
    (tmp_path / "model").symlink_to(workspace / "model")
    algorithm = {"preset": "reinforce_pp", "kl": {"target": 0.001}, "updates_per_step": 2}
    path = write_config(tmp_path, algorithm=algorithm, checkpoint={"every": 1, "keep": 4}, evaluation={})
    launch_training(load_config(path), num_ranks=2, resume=False)
    copy_of_interrupted(tmp_path / "run", tmp_path / "resumed", 2, first_logged=1)
    launch_training(load_config(path, [f"run_dir={tmp_path / 'resumed'}"]), num_ranks=2, resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "run")
    coefficients = [metrics["kl_coefficient"] for _, metrics in logged(tmp_path / "run")]
    assert coefficients[0] == 0.01 and len(set(coefficients)) == 4


def test_ppo_with_four_models_killed_and_resumed_equals_uninterrupted(finished: Path, tmp_path: Path) -> None:
    """Critic and frozen models on other ranks than the policy, each in its own layout.

    The critic starts from the reward model, learns alone in the first step at its own rate, and is saved with its optimizer.
    """
    (tmp_path / "model").symlink_to(finished.parent / "model")
    torch.manual_seed(0)
    scorer = str(tmp_path / "scorer")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).save_pretrained(scorer)
    roles: dict[str, Any] = {"policy": {"num_ranks": 4, "parallel": {"tp": 2, "pp": 2}}}
    roles["reference"] = {"first_rank": 4, "num_ranks": 2, "parallel": {"cp": 2}}
    roles["reward_model"] = {"path": scorer, "weight": 0.5, "first_rank": 5}
    critic = {"path": scorer, "first_rank": 4, "parallel": {"pp": 2}, "optimizer": {"learning_rate": 1e-3}, "warmup_steps": 1}
    algorithm = {"preset": "ppo", "updates_per_step": 2}
    path = write_config(tmp_path, algorithm=algorithm, checkpoint={"every": 1, "keep": 4}, critic=critic, evaluation={}, **roles)
    launch_training(load_config(path), num_ranks=6, resume=False)
    start_and_kill(path, tmp_path / "resumed", seed=3, parent_only=False, num_ranks=6)
    assert not (tmp_path / "resumed" / "hf").exists()
    offload = [f"{model}.offload=all" for model in ("policy", "critic", "reference", "reward_model")]  # changes no number
    launch_training(load_config(path, [*offload, f"run_dir={tmp_path / 'resumed'}"]), num_ranks=6, resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "run")
    critics = [(tmp_path / name / "hf_critic" / "model.safetensors").read_bytes() for name in ("run", "resumed")]
    assert critics[0] == critics[1] != (tmp_path / "scorer" / "model.safetensors").read_bytes()
    lines = [metrics for _, metrics in logged(tmp_path / "run")]
    assert ["gradient_norm" in metrics for metrics in lines] == [False, True, True, True]
    assert all(metrics["critic_gradient_norm"] > 0 and metrics["critic_learning_rate"] == 1e-3 for metrics in lines)
    assert len({metrics["explained_variance"] for metrics in lines}) == 4
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert all(r["reward"] == pytest.approx(r["parts"]["regex"] + 0.5 * r["parts"]["reward_model"]) for r in rollouts)
    assert len({r["parts"]["reward_model"] for r in rollouts}) > 1
    copy_of_interrupted(finished, tmp_path / "without", 3)
    with pytest.raises(CheckpointError, match="has no critic; resume from a checkpoint of a run with one"):
        launch_training(load_config(path, [f"run_dir={tmp_path / 'without'}"]), num_ranks=6, resume=True)


def test_remax_trains_against_greedy_responses_and_is_resumed(workspace: Path, tmp_path: Path) -> None:
    """Two data parallel ranks, two samples to a prompt, dynamic sampling by their difference from the greedy response."""
    (tmp_path / "model").symlink_to(workspace / "model")
    rollout = yaml.safe_load((workspace / "config.yaml").read_text())["rollout"] | {"samples_per_prompt": 2}
    path = write_config(
        tmp_path,
        steps=3,
        policy={},
        algorithm={"preset": "remax", "dynamic_sampling": True},
        rollout=rollout,
        checkpoint={"every": 1, "keep": 3},
        evaluation={},
    )
    launch_training(load_config(path), num_ranks=2, resume=False)
    copy_of_interrupted(tmp_path / "run", tmp_path / "resumed", 1, first_logged=1)
    launch_training(load_config(path, [f"run_dir={tmp_path / 'resumed'}"]), num_ranks=2, resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "run")
    steps = [metrics for _, metrics in logged(tmp_path / "run")]
    assert all(metrics["gradient_norm"] > 0 and 0 <= metrics["greedy_reward_mean"] <= 1 for metrics in steps)
    assert all(metrics["zero_variance_share"] == 0 and metrics["logprob_gap_max"] <= 1e-5 for metrics in steps)
    assert any(metrics["rollout/dropped_filtered"] > 0 for metrics in steps)


def test_a_mixture_with_leftover_groups_and_priorities_is_resumed(workspace: Path, tmp_path: Path) -> None:
    """Two balanced tasks with scorers of their own, rows drawn by success, surplus groups, and responses ended for repetition."""
    (tmp_path / "model").symlink_to(workspace / "model")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = {"type": "reasoning_gym", "task": "chain_sum", "size": 6, "options": options}
    tasks = [
        {"name": "letters", "source": source, "scorers": [{"type": "regex", "pattern": "[a-z]"}]},
        {"name": "digits", "source": source | {"seed": 1}, "scorers": [{"type": "regex", "pattern": "[0-9]{2}", "weight": 5.0}]},
    ]
    mixture = {"type": "mixture", "tasks": tasks}
    path = write_config(
        tmp_path,
        steps=5,
        policy={},
        algorithm={"preset": "aepo", "dynamic_sampling": True, "over_sampling": 2.0, "max_sampling_waves": 30},
        data={"template": "{prompt}\n", "train": mixture, "sampling": {"order": "prioritised", "mixture": "balanced"}},
        rollout={
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_prompt_tokens": 80,
            "max_new_tokens": 12,
            "repetition_stop": {"max_pattern_size": 2, "min_count": 2},
            "embedded": {"threads": 1},
        },
        checkpoint={"every": 1, "keep": 5},
        evaluation={"data": mixture | {"tasks": [{"name": "letters", "source": source | {"seed": 5}}, tasks[1]]}},
    )
    launch_training(load_config(path), num_ranks=2, resume=False)
    steps = [metrics for step, metrics in logged(tmp_path / "run") if step > 0]
    reused = [step for step in range(2, 6) if steps[step - 1]["rollout/reused"] > 0]
    assert reused and all(metrics["prompts/letters"] == metrics["prompts/digits"] == 2 for metrics in steps)
    assert steps[-1]["data/seen_share"] == 1 and len({metrics["data/success_rate_mean"] for metrics in steps}) > 2
    assert any(metrics["repetition_stopped_share"] > 0 for metrics in steps)
    assert {"accuracy", "accuracy/letters", "accuracy/digits"} <= set(steps[-1])
    resume_from = reused[-1] - 1  # the next step begins with groups of the checkpoint
    copy_of_interrupted(tmp_path / "run", tmp_path / "resumed", resume_from)
    launch_training(load_config(path, [f"run_dir={tmp_path / 'resumed'}"]), num_ranks=2, resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "run")


def test_sft_resumed_in_another_layout_gives_the_same_weights(workspace: Path, tmp_path: Path) -> None:
    # Adam would blow up the rounding noise that is all the gradient of the key biases
    overrides = ["kind=sft", "steps=4", "evaluation.data=null", "checkpoint.keep=4", "optimizer.epsilon=1e-4"]
    config = load_config(workspace / "config.yaml", [*overrides, f"run_dir={tmp_path / 'tp'}"])
    launch_training(config, num_ranks=2, resume=False)
    copy_of_interrupted(tmp_path / "tp", tmp_path / "dp", 2)
    moved = load_config(workspace / "config.yaml", [*overrides, "policy.parallel.tp=1", f"run_dir={tmp_path / 'dp'}"])
    launch_training(moved, num_ranks=2, resume=True)
    expected, actual = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("tp", "dp"))
    start = load_file(workspace / "model" / "model.safetensors")
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
        assert not torch.equal(tensor, start[name]), name
    for (step, metrics), (other_step, other_metrics) in zip(logged(tmp_path / "tp"), logged(tmp_path / "dp"), strict=True):
        assert step == other_step
        assert other_metrics == pytest.approx(metrics, rel=1e-4)


def test_eval_gives_the_accuracy_that_the_run_logged(finished: Path) -> None:
    last = logged(finished)[-1][1]
    assert 0 < last["accuracy"] < last["pass@2"] < last["pass@4"]
    path = finished.parent / "config.yaml"
    checkpoint = whole_checkpoints(finished / "checkpoints")[-1]
    result = megarl("eval", path, "--checkpoint", checkpoint, "--nproc", 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-3:] == [f"{name}: {last[name]:.4f}" for name in RATES]
    exported = launch_evaluation(load_config(path, ["policy.parallel.tp=1"]), finished / "hf", num_ranks=1)
    assert exported == {name: last[name] for name in RATES}
    earlier = launch_evaluation(load_config(path), finished.parent / "model", num_ranks=2)
    assert earlier == {name: logged(finished)[0][1][name] for name in RATES} != exported


def test_transformers_loads_the_export_and_computes_what_the_trainer_does(finished: Path, tmp_path: Path) -> None:
    """The trainer's side is the loss of one supervised step: minus the mean log-probability of the answers."""
    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    model = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32).eval()
    start = AutoModelForCausalLM.from_pretrained(finished.parent / "model", dtype=torch.float32).eval()
    overrides = [f"model.path={finished / 'hf'}", "kind=sft", "steps=1", "sft.examples_per_step=3", f"run_dir={tmp_path / 'run'}"]
    config = load_config(finished.parent / "config.yaml", [*overrides, "checkpoint.export=false", "evaluation.data=null"])
    launch_training(config, num_ranks=2, resume=False)
    assert not (tmp_path / "run" / "hf").exists()
    examples = build_sft_source(config, tokenizer).take(3)
    ((_, metrics),) = logged(tmp_path / "run")
    assert metrics["loss"] == pytest.approx(supervised_loss(model, examples), abs=1e-5)
    assert metrics["loss"] != pytest.approx(supervised_loss(start, examples), abs=1e-2)


@torch.no_grad()
def supervised_loss(model: PreTrainedModel, examples: list[SFTExample]) -> float:
    logprobs = []
    for example in examples:
        ids = torch.tensor([example.token_ids])
        every = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logprobs.append(every[example.num_prompt_tokens - 1 :])
    return -float(torch.cat(logprobs).mean())


def test_parity_accepts_good_layouts_and_refuses_an_impossible_bound(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("parity", workspace / "config.yaml", "--num-prompts", 2)
    of_its_own = "tp=2,reference.first_rank=2"
    assert megarl_here(*arguments, "--layouts", "pp=2,vpp=2", of_its_own) == 0
    out, err = capfd.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [(row[0], row[1], row[-1]) for row in rows] == [("pp=2,vpp=2", "2", "ok"), (of_its_own, "3", "ok")]
    assert all(float(gap) <= 1e-5 for row in rows for gap in (*row[3:6], row[7]))
    assert err == ""
    assert megarl_here(*arguments, "--layouts", "tp=2", "--bound", "1e-30") == 1
    assert "ABOVE BOUND" in capfd.readouterr().out
    for layout, words in {
        "critic.tp=2": "the run has no critic; leave out the keys that start with critic.",
        "actor.tp=2": "unknown key 'actor.tp'; give tp, pp, cp,",
        "first_rank=1": "policy.num_ranks: rank 0 of a world of 2 would have no part of any model",
    }.items():
        assert megarl_here(*arguments, "--layouts", layout) != 0
        assert words in capfd.readouterr().err


def test_config_prints_what_can_be_loaded(workspace: Path, tmp_path: Path) -> None:
    result = megarl("config", workspace / "config.yaml", "--nproc", 2, "--set", "steps=7")
    assert (result.returncode, result.stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(result.stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(workspace / "config.yaml", ["steps=7"])


def test_experts_learn_by_grpo_on_expert_parallel_ranks(workspace: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_tiny_model(tmp_path / "model", "qwen3_moe", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config = load_config(write_config(tmp_path, steps=2, policy={"parallel": {"ep": 2}}))
    launch_training(config, num_ranks=2, resume=False)
    (_, *steps) = logged(tmp_path / "run")
    assert [step for step, _ in steps] == [1, 2]
    assert all(metrics["gradient_norm"] > 0 and metrics["logprob_gap_max"] <= 1e-4 for _, metrics in steps)
    start, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "run" / "hf"))
    assert exported.keys() == start.keys()
    assert all(not torch.equal(exported[name], start[name]) for name in start if ".experts." in name)
