"""Short real runs on a tiny model: their config, the ``megarl`` command, and what a run leaves behind."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import yaml

from megarl.cli import main

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
    """Step and metrics of each line of metrics.jsonl, without durations."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], {name: value for name, value in line["metrics"].items() if not name.endswith("seconds")}) for line in lines
    ]


def processes_naming(text: Path) -> list[psutil.Process]:
    """Processes with the text in their command line."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(text) in " ".join(process.info["cmdline"] or ())]
