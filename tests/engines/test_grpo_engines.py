"""Whole GRPO runs with real engines. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from transformers import Qwen2Tokenizer

from megarl.parallel.launch import run_local_ranks
from megarl.weights.checkpoint import whole_checkpoints
from real_engines import ARGUMENTS
from tiny_rollout import make_tiny_model

STEPS = 3
TIMEOUT = 280  # seconds a run may take; most of it is the server's start
SCALING = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 16}  # the prompts are longer than 16 tokens

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def write_config(engine: str, tmp_path: Path) -> Path:
    """The config of a run whose rewards differ already for random weights."""
    make_tiny_model(0, tmp_path / "model")
    letters = {character: index for index, character in enumerate(["<eos>", *map(chr, range(33, 127)), "Ġ", "Ċ"])}
    Qwen2Tokenizer(vocab=letters, merges=[], eos_token="<eos>", pad_token="<eos>", unk_token=None).save_pretrained(
        tmp_path / "model"
    )
    ends = {"eos_token_id": [letters["<eos>"], letters["z"]]}  # the model's config.json has many more, for engines alone
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(ends))
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    values = {
        "kind": "rl",
        "steps": STEPS,
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "rope_scaling": SCALING},
        "policy": {"parallel": {"tp": 2}},
        "optimizer": {"learning_rate": 1e-2},
        "rollout": {
            "engine": engine,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_prompt_tokens": 100,
            "max_new_tokens": 12,
            engine: {"start_timeout": 150, "update_timeout": 60, "arguments": ARGUMENTS[engine]},
        },
        "data": {
            "template": "{prompt}\n",
            "train": {"type": "reasoning_gym", "task": "chain_sum", "size": 64, "seed": 2, "options": options},
        },
        "rewards": {"scorers": [{"type": "regex", "pattern": "[a-g]"}]},
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path) -> subprocess.Popen[str]:
    command = [Path(sys.executable).with_name("megarl"), "train", config, "--nproc", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def server_processes(config: Path) -> list[psutil.Process]:
    """Guards, servers and all below them that serve this config's model, whose scaled folder is the run's."""
    models = str(config.parent / "run" / "models")
    commands = {process: process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])}
    found = [process for process, command in commands.items() if any(word.startswith(models) for word in command)]
    return [*found, *(child for process in found for child in process.children(recursive=True))]


def wait_until_logged(run: subprocess.Popen[str], metrics: Path, num_lines: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not (metrics.exists() and metrics.read_text().count("\n") >= num_lines):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_run_samples_with_the_trained_weights_at_every_step(tmp_path: Path, engine: str) -> None:
    config_path = write_config(engine, tmp_path)
    run_dir = config_path.parent / "run"
    with start(config_path) as run:
        wait_until_logged(run, run_dir / "metrics.jsonl", 1)
        processes = server_processes(config_path)
        assert len(processes) >= 3
        _, errors = run.communicate(timeout=TIMEOUT)
    assert (run.returncode, errors) == (0, "")
    assert psutil.wait_procs(processes, timeout=10)[1] == [] == server_processes(config_path)

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        print(line["step"], "log-probability gap", line["metrics"]["logprob_gap_max"], "seconds", line["seconds"])
        assert line["metrics"]["logprob_gap_max"] <= 1e-4
        assert line["metrics"]["gradient_norm"] > 0
    for step in range(1, STEPS + 1):
        sampled = (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        assert all(json.loads(line)["prompt_tokens"] > 2 * SCALING["original_max_position_embeddings"] for line in sampled)
        assert {tuple(json.loads(line)["weight_versions"]) for line in sampled} == {(step - 1,)}
    output = run_dir / "embeddings.pt"
    run_local_ranks(read_embeddings, (whole_checkpoints(run_dir / "checkpoints"), output), 1, 60)
    embeddings = torch.load(output)
    assert len(embeddings) == STEPS
    for before, after in pairwise(embeddings):
        # far more than the gap allowed above: stale weights in the server would be seen
        assert (after - before).norm() > 1e-3 * before.norm()


def read_embeddings(checkpoints: list[Path], output: Path) -> None:
    """Runs as the rank that megatron-core's reader needs."""
    states = [dist_checkpointing.load_plain_tensors(str(checkpoint / "policy")) for checkpoint in checkpoints]
    torch.save([state["embedding.word_embeddings.weight"] for state in states], output)


@pytest.mark.parametrize(
    ("engine", "name", "rollout"), [("sglang", "SGLang", {}), ("vllm", "vLLM", {"asynchronous": {}, "max_new_tokens": 56})]
)
def test_a_server_killed_during_a_step_ends_the_run_with_one_line(
    tmp_path: Path, engine: str, name: str, rollout: dict[str, Any]
) -> None:
    config_path = write_config(engine, tmp_path)
    settings = yaml.safe_load(config_path.read_text())
    settings["steps"] = 1000
    settings["checkpoint"] = {"every": 0}
    settings["rollout"] |= rollout
    config_path.write_text(yaml.safe_dump(settings))
    with start(config_path) as run:
        metrics = config_path.parent / "run" / "metrics.jsonl"
        wait_until_logged(run, metrics, 4 if rollout else 1)
        processes = server_processes(config_path)
        server = next(process for process in processes if "server_guard.py" not in " ".join(process.cmdline()))
        os.kill(server.pid, signal.SIGKILL)
        killed = time.monotonic()
        _, errors = run.communicate(timeout=60)
    print(f"the run ended {time.monotonic() - killed:.1f} s after its server")
    assert run.returncode == 2
    assert errors.startswith("error: ") and f"{name} was killed by SIGKILL; its last words in " in errors
    assert len(errors.splitlines()) == 1
    for line in map(json.loads, metrics.read_text().splitlines()):
        assert line["metrics"]["logprob_gap_max"] <= 1e-4  # of the current weights' tokens
        assert line["metrics"].get("staleness_max", 0) <= 1
    assert psutil.wait_procs(processes, timeout=10)[1] == [] == server_processes(config_path)
