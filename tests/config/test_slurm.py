"""The scripts in slurm/, run with stand-ins for SLURM's commands: they start what the configs need, on as many nodes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megarl.builtin.scorers import DocumentQAScorer
from megarl.config.load import load_config
from megarl.config.stages import configs_of
from megarl.engines.vllm import VllmEngine
from megarl.weights.manifest import MANIFEST

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
RECIPES = [path for path in SCRIPTS if path.stem != "train"]
TRAINING_GPUS = re.compile(r"Cross-checked for (\d+) GPUs")
STAND_INS = {
    "srun": 'printf "%q " "PYTHONPATH=${PYTHONPATH-}" "VLLM_SERVER_DEV_MODE=${VLLM_SERVER_DEV_MODE-}" "$@" >> srun.log\n'
    "echo >> srun.log\n"
    'case "$*" in *api_server*) exec sleep 60 ;; esac\n',
    "scontrol": 'if [ "$1" = show ]; then seq -f "node%g" 1 "$SLURM_JOB_NUM_NODES"; else echo "$*" >> scontrol.log; fi\n',
    # a server is healthy when it was started
    "curl": 'url=${!#}; port=${url##*:}; until grep -qs -- "--port ${port%/*} " srun.log; do sleep 0.02; done\n',
}


@dataclass(frozen=True, slots=True)
class Step:
    """One call of srun."""

    options: dict[str, str]
    command: list[str]
    environment: dict[str, str]

    def flag(self, name: str) -> str:
        return self.command[self.command.index(name) + 1]


def directives(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))


def run_script(script: Path, folder: Path, *arguments: str) -> list[Step]:
    """Run it in a folder like the repository's; its calls of srun."""
    for name in ("configs", "megarl", "slurm"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}")
        (commands / name).chmod(0o755)
    given = directives(script)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "VLLM_PYTHON": "/engines/vllm/bin/python",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": given["job-name"],
        "SLURM_JOB_NODELIST": "node[1-9]",
        "SLURM_JOB_NUM_NODES": given["nodes"],
        "SLURM_NTASKS_PER_NODE": given["ntasks-per-node"],
        "SLURM_CPUS_PER_TASK": given["cpus-per-task"],
    }
    (folder / "srun.log").unlink(missing_ok=True)
    # SLURM ends what a batch script leaves behind; here its process group is ended
    process = subprocess.Popen(["bash", script, *arguments], cwd=folder, env=environment, process_group=0)
    try:
        assert process.wait(timeout=30) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    steps = []
    for line in (folder / "srun.log").read_text().splitlines():
        words = shlex.split(line)
        start = next(index for index, word in enumerate(words[2:], 2) if not word.startswith("--"))
        options = dict(word.removeprefix("--").partition("=")[::2] for word in words[2:start])
        steps.append(Step(options, words[start:], dict(word.partition("=")[::2] for word in words[:2])))
    return steps


def overrides_of(command: list[str]) -> list[str]:
    return [value for word, value in pairwise(command) if word == "--set"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_ranks_and_servers_are_what_the_config_needs(script: Path, tmp_path: Path) -> None:
    *servers, training = run_script(script, tmp_path)
    given = directives(script)
    program, verb, name, run_dir_option, run_dir, *rest = training.command
    assert (program, verb, run_dir_option) == ("megarl", "train", "--run-dir")
    assert Path(name).stem == script.stem == given["job-name"]
    config = load_config(ROOT / name, overrides_of(rest))
    assert Path(run_dir) == config.run_dir
    gpus = TRAINING_GPUS.search((ROOT / name).read_text(encoding="utf-8"))
    assert gpus is not None
    nodes, tasks = int(training.options["nodes"]), int(training.options["ntasks-per-node"])
    assert nodes * tasks == int(training.options["ntasks"]) == int(gpus[1])
    assert training.options["gpus-per-node"] == given["gpus-per-node"] == str(tasks)
    assert training.options["nodelist"] == ",".join(f"node{number}" for number in range(1, nodes + 1))
    if config.kind == "sft":
        assert not servers and int(given["nodes"]) == nodes
        return
    assert int(given["nodes"]) == nodes + 1
    assert {server.options["nodelist"] for server in servers} == {f"node{given['nodes']}"}
    assert sum(int(server.options["gpus-per-node"]) for server in servers) <= int(given["gpus-per-node"])
    urls = [f"http://node{given['nodes']}:{server.flag('--port')}" for server in servers]
    scorers = [scorer for scorer in config.rewards.scorers if isinstance(scorer, DocumentQAScorer)]
    judges = [scorer.judge for scorer in scorers if scorer.judge is not None]
    assert urls == [config.rollout.vllm.url, *(judge.url.removesuffix("/v1") for judge in judges)]
    assert [server.flag("--model") for server in servers] == [str(config.model.path), *(judge.model for judge in judges)]


def as_flags(words: list[str]) -> dict[str, str]:
    """Values by flag; empty for switches."""
    following = [*words[1:], "--"]
    return {word: "" if value.startswith("--") else value for word, value in zip(words, following, strict=True) if word[:2] == "--"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("script", [path for path in RECIPES if "_sft" not in path.stem], ids=lambda path: path.stem)
def test_policy_server_is_like_one_that_megarl_starts(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, *_, training = run_script(script, tmp_path)
    last = configs_of(load_config(ROOT / training.command[2]))[-1]
    model = tmp_path / last.model.path
    model.mkdir(parents=True)
    shutil.copy(next((ROOT / "tests" / "config" / "models").glob("Qwen2.5-7B")) / "config.json", model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = {"url": None, "python": Path(sys.executable), "tensor_parallel_size": 4}
    vllm = last.rollout.vllm.model_copy(update=own)
    config = last.model_copy(update={"rollout": last.rollout.model_copy(update={"vllm": vllm})})
    (_, *command), environment = VllmEngine(config, tmp_path, {}).command(8000)
    (_, *served) = server.command
    flags = as_flags(served)
    overrides = flags.pop(
        "--hf-overrides", None
    )  # MegaRL starts its own with a config.json without the key (models/scaled_folder.py)
    assert overrides == ('{"dual_chunk_attention_config": null}' if script.stem == "long_context_1m" else None)
    assert flags == as_flags(command) | {"--host": server.options["nodelist"]}
    assert training.command[training.command.index("rollout.vllm.api_key_env=MEGARL_API_KEY") - 1] == "--set"
    assert not re.search(r"[0-9a-f]{64}", " ".join(served))  # the key is in the environment alone
    assert [word for word in served if word in ("-m", "vllm.entrypoints.openai.api_server")] == command[:2]
    assert Path(server.environment["PYTHONPATH"]).resolve() == Path(environment["PYTHONPATH"]).resolve()
    assert server.environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_SERVER_DEV_MODE"]
    assert server.options["gpus-per-node"] == "4"


@pytest.mark.timeout(60)
def test_any_config_by_the_general_script(tmp_path: Path) -> None:
    arguments = ("configs/cluster/qwen2_5_7b_grpo.yaml", "--set", "steps=3")
    (training,) = run_script(ROOT / "slurm" / "train.sbatch", tmp_path, *arguments)
    assert training.command == ["megarl", "train", arguments[0], "--run-dir", "runs/qwen2_5_7b_grpo", *arguments[1:]]
    assert training.options["ntasks"] == "8"
    assert not training.environment["VLLM_SERVER_DEV_MODE"] and not training.environment["PYTHONPATH"]


@pytest.mark.timeout(60)
def test_goes_on_from_a_checkpoint_and_puts_a_run_without_aside(tmp_path: Path) -> None:
    script, run = ROOT / "slurm" / "qwenlong_l1_14b_sft.sbatch", tmp_path / "runs" / "qwenlong_l1_14b_sft"
    (run / "checkpoints" / "step_00000040").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    (training,) = run_script(script, tmp_path)  # the checkpoint is not finished
    assert "--resume" not in training.command
    assert not run.exists() and (tmp_path / "runs" / "qwenlong_l1_14b_sft-before-7-0" / "metrics.jsonl").exists()
    checkpoint = run / "checkpoints" / "step_00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    (training,) = run_script(script, tmp_path)
    assert training.command[-1] == "--resume" and run.exists()
