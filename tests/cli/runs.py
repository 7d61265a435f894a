"""Short real runs on a tiny model: their config, the ``megarl`` command, and what a run leaves behind."""

import contextlib
import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import yaml

from megarl.cli import main
from megarl.metrics import find_metric
from megarl.weights.checkpoint import whole_checkpoints

MEGARL = Path(sys.executable).with_name("megarl")
REPOSITORY = Path(__file__).parent.parent.parent
TIMEOUT = 120  # seconds a run may take


def make_model(folder: Path, **sizes: int) -> None:
    """The quickstart's own way to make a model."""
    spec = importlib.util.spec_from_file_location("make_model", REPOSITORY / "examples" / "quickstart" / "make_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_model(folder, **({"hidden": 64, "layers": 4, "intermediate": 96} | sizes))


def write_config(folder: Path, **changes: Any) -> Path:
    """Write ``config.yaml`` of an RL run whose rewards differ already for random weights; the model is ``folder/model``."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    values: dict[str, Any] = {
        "kind": "rl",
        "steps": 4,
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "policy": {"parallel": {"tp": 2}},
        "optimizer": {"learning_rate": 2e-2, "schedule": "cosine", "warmup_steps": 1},
        "algorithm": {"kl": {"place": "loss", "coefficient": 0.01}},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_prompt_tokens": 80,
            "max_new_tokens": 6,
            "embedded": {"threads": 1},
        },
        "sft": {"examples_per_step": 4, "max_tokens": 96},
        "data": {
            "template": "{prompt}\n",
            "train": {"type": "reasoning_gym", "task": "chain_sum", "size": 12, "seed": 2, "options": options},
        },
        "rewards": {"scorers": [{"type": "regex", "pattern": "[a-z]"}]},
        "evaluation": {
            "data": {"type": "reasoning_gym", "task": "chain_sum", "size": 8, "seed": 3, "options": options},
            "samples_per_prompt": 4,
            "temperature": 1.0,
        },
        "checkpoint": {"every": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def megarl(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run([MEGARL, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=TIMEOUT)


def megarl_here(*arguments: object) -> int:
    """The same without a new process; the exit status. What it and its ranks print goes to this process's stdout and stderr."""
    with mock.patch.object(sys, "argv", ["megarl", *map(str, arguments)]), pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


def logged(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of each line of metrics.jsonl, without durations; every metric is one of docs/metrics.md."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    unknown = {name for line in lines for name in line["metrics"] if find_metric(name) is None}
    assert not unknown, f"not in megarl/metrics.py: {unknown}"
    return [
        (line["step"], {name: value for name, value in line["metrics"].items() if not name.endswith("seconds")}) for line in lines
    ]


def processes_naming(text: Path) -> list[psutil.Process]:
    """Processes with the text in their command line."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(text) in " ".join(process.info["cmdline"] or ())]


def assert_same_run(run: Path, expected: Path) -> None:
    """Bit for bit: every metric of every step, and the exported weights."""
    assert logged(run) == logged(expected)
    assert (run / "hf" / "model.safetensors").read_bytes() == (expected / "hf" / "model.safetensors").read_bytes()


def start_and_kill(config: Path, run_dir: Path, seed: int, *, parent_only: bool, num_ranks: int = 2) -> int:
    """Start a run, kill it at a random moment after its first checkpoint, wait until all is gone; the steps it had done."""
    moment = random.Random(seed)
    num_lines, delay = moment.randint(2, 3), moment.uniform(0, 0.4)
    command = [MEGARL, "train", config, "--nproc", str(num_ranks), "--run-dir", run_dir]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + TIMEOUT
        while not whole_checkpoints(run_dir / "checkpoints") or num_logged(run_dir) < num_lines:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()
            time.sleep(0.02)
        time.sleep(delay)  # this is the random moment
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        assert len(processes) > num_ranks
        for process in processes[:1] if parent_only else processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # a writer of the checkpoint that has done its work
                process.kill()
        assert run.wait() == -signal.SIGKILL
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    assert not processes_naming(run_dir)
    return num_logged(run_dir) - 1


def num_logged(run_dir: Path) -> int:
    """Lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def copy_of_interrupted(run: Path, copy: Path, step: int, first_logged: int = 0) -> None:
    """The run as it stood when it had saved ``step``; its log begins with step ``first_logged``."""
    copy.mkdir()
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / f"step_{step:08d}").symlink_to(run / "checkpoints" / f"step_{step:08d}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: step - first_logged + 1]))
