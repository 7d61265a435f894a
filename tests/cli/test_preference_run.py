"""Preference runs from start to end: killed and resumed, evaluated on held-out pairs, exported, compared between layouts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megarl.config.load import load_config
from megarl.data.sampler import build_evaluation_pairs
from megarl.errors import ConfigError
from megarl.loop.launch import launch_evaluation, launch_training
from megarl.weights.checkpoint import whole_checkpoints
from runs import assert_same_run, copy_of_interrupted, logged, megarl_here, start_and_kill, write_config

Capture = pytest.CaptureFixture[str]


def rows(first: int, last: int) -> str:
    """Sums, with the right and a wrong result."""
    pairs = [
        {"prompt": f"{n} + {n * n % 7} =", "chosen": f"{n + n * n % 7}", "rejected": f"{3 * n + 40} or so"}
        for n in range(first, last)
    ]
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


def write_preference_config(folder: Path, workspace: Path, **changes: Any) -> Path:
    (folder / "train.jsonl").write_text(rows(0, 14))
    (folder / "held_out.jsonl").write_text(rows(20, 26))
    values: dict[str, Any] = {
        "kind": "preference",
        "model": {"path": str(workspace / "model")},
        "preference": {"pairs_per_step": 4, "max_tokens": 64},
        "optimizer": {"learning_rate": 2e-3, "schedule": "cosine"},
        "data": {"template": "{prompt}\n", "train": {"type": "jsonl", "path": str(folder / "train.jsonl")}},
        "evaluation": {"data": {"type": "jsonl", "path": str(folder / "held_out.jsonl")}},
        "rewards": {},
    }
    return write_config(folder, **(values | changes))


@pytest.mark.timeout(120)
def test_killed_and_resumed_evaluated_and_exported(workspace: Path, tmp_path: Path) -> None:
    """Policy and reference in layouts of their own."""
    path = write_preference_config(tmp_path, workspace, reference={"num_ranks": 1})
    launch_training(load_config(path), num_ranks=2, resume=False)
    (start, *steps) = [metrics for _, metrics in logged(tmp_path / "run")]
    assert start["held_out/loss"] == pytest.approx(math.log(2), abs=1e-5) and start["held_out/margin"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["held_out/accuracy"] > 0.9 and steps[-1]["held_out/loss"] < 0.69
    assert steps[-1]["margin"] > steps[1]["margin"] > 0 and all(metrics["gradient_norm"] > 0 for metrics in steps)

    assert 1 <= start_and_kill(path, tmp_path / "killed", seed=5, parent_only=False) < 4
    launch_training(load_config(path, [f"run_dir={tmp_path / 'killed'}"]), num_ranks=2, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "run")

    held_out = {name: value for name, value in steps[-1].items() if name.startswith("held_out/")}
    checkpoint = whole_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert launch_evaluation(load_config(path), checkpoint, num_ranks=2) == held_out
    # the exported policy is still compared with what it started from
    assert launch_evaluation(load_config(path), tmp_path / "run" / "hf", num_ranks=2) == held_out
    one_rank = load_config(path, ["policy.parallel.tp=1", "reference=null", "policy.parallel.distributed_optimizer=false"])
    assert launch_evaluation(one_rank, tmp_path / "run" / "hf", num_ranks=1) == pytest.approx(held_out, rel=1e-3)
    with pytest.raises(ConfigError, match=r"model\.init: random weights, which the loss compares with, cannot be drawn again"):
        launch_evaluation(load_config(path, ["model.init=random"]), tmp_path / "run" / "hf", num_ranks=2)
    assert by_transformers(path, tmp_path / "run" / "hf") == pytest.approx(held_out["held_out/loss"], abs=1e-5)


@torch.no_grad()
def by_transformers(path: Path, exported: Path) -> float:
    """DPO's loss on the held-out pairs."""
    config = load_config(path)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (exported, config.model.path)
    )
    losses = []
    for pair in build_evaluation_pairs(config, AutoTokenizer.from_pretrained(exported)):
        ratios = []
        for response in (pair.chosen, pair.rejected):
            ids, prompt = torch.tensor([response.token_ids]), response.num_prompt_tokens
            said = [model(ids).logits[0, prompt - 1 : -1].double().log_softmax(-1) for model in (policy, reference)]
            ratios.append(
                float(sum(one.gather(1, ids[0, prompt:, None]).sum() * sign for one, sign in zip(said, (1, -1), strict=True)))
            )
        losses.append(math.log(1 + math.exp(-0.1 * (ratios[0] - ratios[1]))))
    return sum(losses) / len(losses)


@pytest.mark.timeout(120)
def test_reward_model_resumed_evaluated_and_read_by_transformers(workspace: Path, tmp_path: Path) -> None:
    path = write_preference_config(tmp_path, workspace, kind="reward_model", checkpoint={"every": 1, "keep": 4})
    launch_training(load_config(path), num_ranks=2, resume=False)
    copy_of_interrupted(tmp_path / "run", tmp_path / "resumed", 2)
    launch_training(load_config(path, [f"run_dir={tmp_path / 'resumed'}"]), num_ranks=2, resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "run")
    (start, *steps) = [metrics for _, metrics in logged(tmp_path / "run")]
    assert steps[-1]["held_out/accuracy"] == 1 and steps[-1]["held_out/loss"] < 0.6 < start["held_out/loss"]

    held_out = {name: value for name, value in steps[-1].items() if name.startswith("held_out/")}
    checkpoint = whole_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    for saved in (checkpoint, tmp_path / "run" / "hf"):
        assert launch_evaluation(load_config(path), saved, num_ranks=2) == held_out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "hf", dtype=torch.float32).eval()
    scores = []
    for pair in build_evaluation_pairs(load_config(path), AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")):
        ids = [torch.tensor([response.token_ids]) for response in (pair.chosen, pair.rejected)]
        scores.append([float(model(one, attention_mask=torch.ones_like(one)).logits) for one in ids])
    assert sum(chosen for chosen, _ in scores) / len(scores) == pytest.approx(held_out["held_out/chosen_reward"], abs=1e-5)
    losses = [math.log(1 + math.exp(rejected - chosen)) for chosen, rejected in scores]
    assert sum(losses) / len(losses) == pytest.approx(held_out["held_out/loss"], abs=1e-5)


@pytest.mark.timeout(120)
def test_layouts_are_compared_on_its_own_pairs(workspace: Path, tmp_path: Path, capfd: Capture) -> None:
    path = write_preference_config(tmp_path, workspace)
    assert megarl_here("parity", path, "--layouts", "tp=2", "--layouts", "cp=2") == 0
    assert capfd.readouterr().out.count("ok") == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("change", "overrides", "expected"),
    [
        (
            {"rejected": "7"},
            [],
            "train.jsonl:15: fields 'chosen' and 'rejected' are equal, so neither is preferred; leave the row out",
        ),
        ({"rejected": "1" * 80}, [], "train.jsonl:15: the rejected response of row train/14 has "),
        (
            {"chosen": "2" * 40, "rejected": "1" * 40},
            ["policy.max_tokens_per_micro_batch=70"],
            "train.jsonl:15: the pair of row train/14 has ",
        ),
    ],
)
def test_a_bad_row_is_one_line(
    workspace: Path, tmp_path: Path, capfd: Capture, change: dict[str, str], overrides: list[str], expected: str
) -> None:
    path = write_preference_config(tmp_path, workspace)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "3 + 4 =", "chosen": "7"} | change) + "\n")
    assert megarl_here("train", path, "--nproc", 2, *(part for one in overrides for part in ("--set", one))) == 2
    error = capfd.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_an_answer_is_not_a_pair(workspace: Path, tmp_path: Path, capfd: Capture) -> None:
    path = write_preference_config(tmp_path, workspace)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert megarl_here("train", path, "--nproc", 2) == 2
    assert "train.jsonl:1: no field 'chosen' (it has: prompt, answer); add it or set chosen_field" in capfd.readouterr().err
