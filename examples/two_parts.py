"""What the examples share that train a small model in two parts: a supervised warm-up, then GRPO, on two ranks of this machine."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).parent


def train(name: str, hidden: int) -> tuple[Path, float]:
    """Make model and data and run ``sft.yaml`` and ``grpo.yaml`` of ``configs/NAME``, as the command line asks.

    Args:
        name: of the example's folder, which has a make_data.py.
        hidden: width of the model.

    Returns:
        The folder of the runs, and the seconds it took.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs") / name)
    options = parser.parse_args()
    folder: Path = options.folder
    for part in ("model", "sft", "grpo"):
        shutil.rmtree(folder / part, ignore_errors=True)
    start = time.monotonic()
    make_model = EXAMPLES / "quickstart" / "make_model.py"
    run(sys.executable, make_model, folder / "model", "--hidden", str(hidden), "--layers", "4", "--task", "chain_sum")
    examples = folder / "sft.jsonl"
    run(sys.executable, EXAMPLES / name / "make_data.py", examples)
    megarl, configs = Path(sys.executable).parent / "megarl", EXAMPLES.parent / "configs" / name
    for part, model, data in (("sft", "model", "data.train.path"), ("grpo", "sft/hf", "data.exclude.0.path")):
        settings = (f"model.path={folder / model}", f"{data}={examples}", f"seed={options.seed}")
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        run(megarl, "train", configs / f"{part}.yaml", "--nproc", "2", "--run-dir", folder / part, *overrides)
    return folder, time.monotonic() - start


def run(*command: str | Path) -> None:
    """Print a command and run it."""
    print("$", " ".join(map(str, command)), flush=True)
    status = subprocess.run([str(part) for part in command], check=False).returncode
    if status:
        raise SystemExit(status)  # it has said why


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The values of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def report(console: Console, folder: Path, seconds: float, more: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Print the held-out accuracies of the GRPO run in ``folder``.

    Args:
        console: to print on.
        folder: of the runs.
        seconds: that both parts took.
        more: metrics to show beside, to the titles of their columns.

    Returns:
        The answers of the last evaluation.
    """
    lines = {line["step"]: line["metrics"] for line in read_lines(folder / "grpo" / "metrics.jsonl")}
    more = more or {}
    table = Table("GRPO step", "held-out accuracy", *more.values(), title="Problems that neither the warm-up nor GRPO trained on")
    evaluated = {step: metrics["accuracy"] for step, metrics in lines.items() if "accuracy" in metrics}
    for step, accuracy in evaluated.items():
        columns = [f"{lines[step][name]:.2f}" if name in lines[step] else "" for name in more]
        table.add_row(str(step), f"{accuracy:.1%}", *columns)
    console.print(table)
    before, *_, after = evaluated.values()
    console.print(f"before GRPO {before:.1%}, after {after:.1%} ({100 * (after - before):+.1f} points) in {seconds:.0f} s")
    return read_lines(max((folder / "grpo" / "rollouts").glob("evaluation_*.jsonl")))
