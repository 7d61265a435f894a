"""``megarl plan sync``: what it prints, and one line with the numbers where there is no plan."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

from megarl.cli import main
from tiny import CLASSES

DEEPSEEK_V3 = Path(__file__).parent.parent.parent / "benchmarks" / "deepseek_v3"


def write_config(folder: Path, model: Path, **parallel: int) -> Path:
    values = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": str(model)},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "policy": {"parallel": parallel},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config_class, _, special = CLASSES["qwen3"]
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 131}
    config_class(**(special | sizes), num_hidden_layers=4).save_pretrained(tmp_path / "model")
    return write_config(tmp_path, tmp_path / "model", tp=2, pp=2)


def plan_sync(*arguments: object) -> int:
    """Exit status of the command in this process."""
    with mock.patch.object(sys, "argv", ["megarl", "plan", "sync", *map(str, arguments)]):
        try:
            main()
        except SystemExit as ending:
            return int(ending.code or 0)
    return 0


def test_prints_bytes_balance_memory_and_time(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = (config, "--engine", "vllm", "--tp", 2, "--replicas", 2, "--world-size", 8)
    assert plan_sync(*arguments, "--copies", 2) == 0
    text = capfd.readouterr().out
    assert "Megatron tp=2,pp=2 on 8 ranks → 2 × vllm tp=2,ep=1 on 4 ranks" in text
    assert "= 1.00" in text and "worst sender / mean" in text and "staging memory of a rank" in text and "predicted" in text
    assert text.count("bucket 0: rank") == 2
    assert plan_sync(*arguments, "--json", "--copies", 2) == 0
    values = json.loads(capfd.readouterr().out)
    assert values["bytes_sent"] == values["bytes_needed"] == sum(map(sum, values["received_bytes_of_ranks"].values()))
    assert {len(ranks) for ranks in values["sent_bytes_of_ranks"].values()} == {8}
    assert len(values["first_copies"]) == 2


def test_to_another_megatron_layout(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sent = []
    for extra in ([], ["--optimizer"], ["--set", "model.dtype=bfloat16"]):
        assert plan_sync(config, "--to", "tp=4,pp=1", "--world-size", 8, "--json", *extra) == 0
        sent.append(json.loads(capfd.readouterr().out)["bytes_sent"])
    assert sent[0] == sent[1] == 2 * sent[2]


def test_engines_on_their_own_nodes_get_everything_over_the_network(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_sync(config, "--engine", "sglang", "--tp", 2, "--disjoint", "--json") == 0
    values = json.loads(capfd.readouterr().out)
    assert sum(values["received_bytes_of_ranks"]["network"]) == values["bytes_sent"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm", "--tp", 3], "vllm tp 3 does not divide the model's 8 attention heads"),
        (["--engine", "vllm", "--ep", 2], "vllm ep 2: the model has no experts (qwen3); use ep 1"),
        (["--engine", "vllm", "--replicas", 5], "the engines have 5 ranks and training has 4 GPUs; use fewer --replicas"),
        (["--engine", "vllm", "--world-size", 6], "world size 6 is not divisible by tp 2 × pp 2 × cp 1 = 4"),
        (
            ["--to", "tp=8", "--world-size", 8],
            "tp 8 does not divide model.layers.0.self_attn.q_proj.weight of shape [128, 64] (4 key-value heads)",
        ),
        (["--to", "tp=two"], "plan sync --to 'tp=two': tp:"),
        (["--to", "tp=2", "--set", "policy.parallel.pp=3"], "4 layers cannot be shared out over pp 3 stages"),
        ([], "give either --engine vllm or sglang, or --to with a Megatron layout"),
        (["--engine", "vllm", "--optimizer"], "engines take no optimizer state"),
    ],
)
def test_what_cannot_be_is_one_line(config: Path, capfd: pytest.CaptureFixture[str], arguments: list[object], message: str) -> None:
    assert plan_sync(config, *arguments) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "sglang", "--tp", 16, "--ep", 48], "sglang ep 48 does not divide the model's 256 experts"),
        (["--engine", "vllm", "--tp", 24], "vllm tp 24 does not divide the model's 128 attention heads"),
        (["--engine", "vllm", "--tp", 16, "--ep", 4], "vllm ep 4 with tp 16"),
        (["--engine", "sglang", "--tp", 32, "--ep", 16, "--set", "policy.parallel.ep=3"], "ep 3 does not divide the model's 256"),
    ],
)
def test_experts_that_do_not_divide(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    config = write_config(tmp_path, DEEPSEEK_V3, tp=8, ep=8, etp=1)
    assert plan_sync(config, *arguments, "--disjoint") == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
