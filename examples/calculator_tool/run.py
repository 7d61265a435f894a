"""A small model learns to use a calculator: a supervised warm-up that shows calls, then GRPO with the calculator at hand.

python examples/calculator_tool/run.py [--seed 0] [--folder runs/calculator_tool]
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs" / "calculator_tool"


def run(*command: str | Path) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], check=True)


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def report(folder: Path, seconds: float) -> None:
    console = Console()
    lines = answers(folder / "grpo" / "metrics.jsonl")
    evaluated = [(line["step"], line["metrics"]["accuracy"]) for line in lines if "accuracy" in line["metrics"]]
    turns = {line["step"]: line["metrics"]["turns_mean"] for line in lines if "turns_mean" in line["metrics"]}
    table = Table("GRPO step", "held-out accuracy", "turns in training", title="Problems that were never trained on")
    for step, accuracy in evaluated:
        table.add_row(str(step), f"{accuracy:.1%}", f"{turns[step]:.2f}" if step in turns else "")
    console.print(table)
    (_, before), (last, after) = evaluated[0], evaluated[-1]
    console.print(f"before GRPO {before:.1%}, after {after:.1%} ({100 * (after - before):+.1f} points) in {seconds:.0f} s")
    answer = answers(folder / "grpo" / "rollouts" / f"evaluation_{last:06d}.jsonl")[0]
    console.print(f"  prompt: {answer['prompt'].strip()}", highlight=False, markup=False)
    for turn in answer["turns"]:
        ((speaker, text),) = turn.items()
        console.print(f"  {speaker}: {text}", highlight=False, markup=False)
    console.print(f"run folder: {folder / 'grpo'}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/calculator_tool"))
    options = parser.parse_args()
    folder: Path = options.folder
    for part in ("model", "sft", "grpo"):
        shutil.rmtree(folder / part, ignore_errors=True)
    start = time.monotonic()
    make_model = HERE.parent / "quickstart" / "make_model.py"
    run(sys.executable, make_model, folder / "model", "--hidden", "128", "--layers", "4", "--task", "chain_sum")
    examples = folder / "sft.jsonl"
    run(sys.executable, HERE / "make_data.py", examples)
    megarl = Path(sys.executable).parent / "megarl"
    for part, model, data in (("sft", "model", "data.train.path"), ("grpo", "sft/hf", "data.exclude.0.path")):
        settings = (f"model.path={folder / model}", f"{data}={examples}", f"seed={options.seed}")
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        run(megarl, "train", CONFIGS / f"{part}.yaml", "--nproc", "2", "--run-dir", folder / part, *overrides)
    report(folder, time.monotonic() - start)


if __name__ == "__main__":
    main()
