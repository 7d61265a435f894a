"""``megarl plan memory``: what it prints, what it advises, and one line where it cannot state anything."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from megarl.cli import main
from tiny import CLASSES


def plan_memory(*arguments: object) -> int:
    """Exit status of the command in this process."""
    with mock.patch.object(sys, "argv", ["megarl", "plan", "memory", *map(str, arguments), "--device", "cpu"]):
        try:
            main()
        except SystemExit as ending:
            return int(ending.code or 0)
    return 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config_class, _, special = CLASSES["qwen3"]
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 768}
    config_class(**(special | sizes), num_hidden_layers=8, vocab_size=8000, max_position_embeddings=8192).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "rows.jsonl").write_text("")
    values = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": str(tmp_path / "model"), "init": "random"},
        "data": {"train": {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}, "template": "{prompt}"},
        "rewards": {"scorers": [{"type": "exact"}]},
        "policy": {"parallel": {"tp": 2}, "max_tokens_per_micro_batch": 8192},
        "rollout": {"max_prompt_tokens": 512, "max_new_tokens": 512},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "config.yaml"


def as_json(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Of a run with one stage: that stage, and what the whole says of it."""
    found = json.loads(capfd.readouterr().out)
    (stage,) = found["stages"]
    assert (found["peak_bytes"], found["worst_stage"]) == (stage["peak_bytes"], None)
    return stage


def test_prints_parts_and_moments(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_memory(config, "--world-size", 4, "--limit-gib", 100) == 0
    text = capfd.readouterr().out
    for words in (
        "peak of 4 ranks on cpu",
        "rank 0 (stage 0)",
        "rank 1 and 2 more",
        "policy optimizer state",
        "engine weights",
        "MLP",
    ):
        assert words in text


def test_json_adds_up(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_memory(config, "--world-size", 4, "--json") == 0
    found = as_json(capfd)
    worst = found["ranks"][0]
    parts = [part["bytes"] for part in worst["held"] + worst["added"]]
    assert found["peak_bytes"] == worst["peak_bytes"] == pytest.approx(sum(parts))
    assert worst["peak_bytes"] == max(worst["moments"].values())
    assert sum(kind["num_ranks"] for kind in found["ranks"]) == 4


def test_supervised_run_has_one_model_and_no_engine(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_memory(config, "--world-size", 2, "--set", "kind=sft", "--set", "sft.max_tokens=512", "--json") == 0
    (kind,) = as_json(capfd)["ranks"]
    assert set(kind["moments"]) == {"policy update", "policy optimizer step", "policy gradient reduction"}
    assert {part["owner"] for part in kind["held"]} == {"policy", "run"}


def test_advice_holds(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each setting said to be enough is enough, with the peak that was promised; those together, too."""
    assert plan_memory(config, "--world-size", 4, "--json") == 0
    peak = as_json(capfd)["peak_bytes"]
    limit = ("--limit-gib", 0.7 * peak / 2**30, "--json")
    assert plan_memory(config, "--world-size", 4, *limit) == 1
    enough = [change for change in as_json(capfd)["changes"] if change["peak_bytes"] <= 0.7 * peak]
    assert {change["settings"][0] for change in enough} >= {"policy.recompute=full", "policy.max_tokens_per_micro_batch=4096"}
    for change in enough:
        assert plan_memory(config, "--world-size", 4, "--set", change["settings"][0], *limit) == 0
        assert as_json(capfd)["peak_bytes"] == change["peak_bytes"]
    assert plan_memory(config, "--world-size", 4, "--limit-gib", 0.25 * peak / 2**30, "--json") == 1
    found = as_json(capfd)
    assert not [change for change in found["changes"] if change["peak_bytes"] <= 0.25 * peak]
    together = found["changes_together"]["settings"]
    assert len(together) > 1
    settings = [word for setting in together if not setting.startswith("--") for word in ("--set", setting)]
    world = next((setting.split("=")[1] for setting in together if setting.startswith("--")), 4)
    assert plan_memory(config, "--world-size", world, *settings, "--limit-gib", 0.25 * peak / 2**30) == 0


def test_above_the_limit_names_the_largest_parts(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_memory(config, "--world-size", 4, "--limit-gib", 0.01) == 1
    text = capfd.readouterr().out
    assert "above the limit of 0.01 GiB" in text
    assert "policy activations: " in text.split("the largest parts are")[1]
    assert "no combination of these is under the limit" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--world-size is not given, and policy.parallel needs a multiple of 2 ranks"),
        (("--world-size", 3), "policy.parallel"),
        (("--world-size", 2, "--set", "policy.parallel.tp=3"), "policy.parallel"),
        (("--world-size", 2, "--set", "policy.max_tokens_per_micro_batch=100"), "max_tokens_per_micro_batch"),
    ],
)
def test_refusals_are_one_line(config: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[object, ...], words: str) -> None:
    assert plan_memory(config, *arguments) == 2
    error = capfd.readouterr().err
    assert words in error.splitlines()[0]
    assert all(line.startswith("configuration error: ") for line in error.splitlines())
