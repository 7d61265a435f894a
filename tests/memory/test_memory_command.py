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


def test_preference_run_has_a_reference_and_holds_pairs(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["kind=preference", "preference.max_tokens=512", "preference.pairs_per_step=3"]
    given = [part for setting in settings for part in ("--set", setting)]
    assert plan_memory(config, "--world-size", 2, *given, "--json") == 0
    (kind,) = as_json(capfd)["ranks"]
    assert set(kind["moments"]) == {*("policy update", "policy optimizer step", "policy gradient reduction", "reference scoring")}
    held = {part["owner"]: part for part in kind["held"] if part["name"] == "weights"}
    assert held["reference"]["bytes"] == pytest.approx(held["policy"]["bytes"], rel=1e-3)  # which are aligned
    assert plan_memory(config, "--world-size", 2, *given, "--set", "preference.loss=orpo", "--json") == 0
    assert {part["owner"] for part in as_json(capfd)["ranks"][0]["held"]} == {"policy", "run"}
    # a micro-batch of one pair is as large as one of two examples of SFT
    supervised = ["kind=sft", "sft.max_tokens=512", "sft.examples_per_step=6"]
    assert plan_memory(config, "--world-size", 2, *(part for one in supervised for part in ("--set", one)), "--json") == 0
    assert as_json(capfd)["ranks"][0]["moments"]["policy update"] < kind["moments"]["policy update"]


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


STAGES = [
    {"name": "short", "steps": 1, "max_prompt_tokens": 512},
    {
        "name": "long",
        "steps": 1,
        "max_prompt_tokens": 7000,
        "changes": {"policy": {"parallel": {"tp": 1, "cp": 2}, "max_tokens_per_micro_batch": 8000}},
    },
]


@pytest.fixture
def staged(config: Path) -> Path:
    values = yaml.safe_load(config.read_text()) | {"steps": 2, "curriculum": {"stages": STAGES}}
    values["rollout"] |= {"engine": "vllm"}  # in a process of its own
    values["policy"]["max_tokens_per_micro_batch"] = 1024
    config.write_text(yaml.safe_dump(values))
    return config


def alone(config: Path, capfd: pytest.CaptureFixture[str], stage: int) -> dict[str, Any]:
    """What is stated of a run that is this stage from its beginning to its end."""
    values = yaml.safe_load(config.read_text())
    chosen = values.pop("curriculum")["stages"][stage]
    values["rollout"]["max_prompt_tokens"] = chosen["max_prompt_tokens"]
    values["policy"] |= chosen.get("changes", {}).get("policy", {})
    config.with_name("alone.yaml").write_text(yaml.safe_dump(values))
    assert plan_memory(config.with_name("alone.yaml"), "--world-size", 4, "--json") == 0
    return as_json(capfd)


def test_every_stage_and_what_is_between_them(staged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A stage is stated as a run of its own is; between two both layouts are there, the old one without gradients, with buckets of
    64 MiB to send and receive."""
    assert plan_memory(staged, "--world-size", 4, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    short, move, long = found["stages"]
    assert [stage["name"] for stage in found["stages"]] == ["short", "short → long", "long"]
    assert [stage["is_move"] for stage in found["stages"]] == [False, True, False]
    alones = [alone(staged, capfd, stage) for stage in (0, 1)]
    assert [short["ranks"], long["ranks"]] == [single["ranks"] for single in alones]
    old, new = (
        {part["name"]: part["bytes"] for part in single["ranks"][0]["held"] if part["owner"] == "policy"} for single in alones
    )  # without the batch
    assert move["peak_bytes"] == pytest.approx(sum(old.values()) - old["gradients"] + sum(new.values()) + 2 * (64 << 20))
    assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in found["stages"])
    assert found["worst_stage"] == "long"
    assert plan_memory(staged, "--world-size", 4) == 0
    text = capfd.readouterr().out
    assert "short → long" in text and "policy changes layout" in text
    assert f"peak of 4 ranks on cpu: {found['peak_bytes'] / 2**30:.3f} GiB, in long, on rank 0" in text


def test_advice_for_a_stage_holds(staged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit that only the long stage passes: its settings are keys of that stage, and bring it under the limit."""
    assert plan_memory(staged, "--world-size", 4, "--json") == 0
    before = json.loads(capfd.readouterr().out)
    limit = 0.9 * before["peak_bytes"]
    assert max(stage["peak_bytes"] for stage in before["stages"][:2]) < limit
    arguments = ("--world-size", 4, "--limit-gib", limit / 2**30, "--json")
    assert plan_memory(staged, *arguments) == 1
    short, move, long = json.loads(capfd.readouterr().out)["stages"]
    assert not short["changes"] and not move["changes"]
    enough = [change for change in long["changes"] if change["peak_bytes"] <= limit]
    assert "curriculum.stages.1.changes.policy.recompute=full" in [change["settings"][0] for change in enough]
    for change in enough:
        (setting,) = change["settings"]
        if setting.startswith("--"):
            continue
        assert plan_memory(staged, "--set", setting, *arguments) == 0
        short_now, _, long_now = json.loads(capfd.readouterr().out)["stages"]
        assert long_now["peak_bytes"] == change["peak_bytes"]
        assert short_now["peak_bytes"] == short["peak_bytes"] or not setting.startswith("curriculum.")
    assert plan_memory(staged, "--world-size", 4, "--limit-gib", 0.01) == 1
    text = capfd.readouterr().out
    assert "short → long is above the limit of 0.01 GiB" in text and "both layouts are there at the same time" in text


def test_ranks_of_the_stage_that_needs_most(staged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_memory(staged, "--set", "policy.parallel.tp=1", "--set", "curriculum.stages.1.changes.policy.parallel.cp=4") == 2
    assert "policy.parallel needs a multiple of 4 ranks" in capfd.readouterr().err


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
