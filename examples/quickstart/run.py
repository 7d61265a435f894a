"""The quickstart: a small model from random weights, a supervised warm-up, then GRPO, on two ranks of this machine.

python examples/quickstart/run.py [--seed 0] [--folder runs/quickstart]
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs" / "quickstart"


def run(*command: str | Path) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], check=True)


def accuracies(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["metrics"]["accuracy"]) for line in lines if "accuracy" in line["metrics"]]


def report(folder: Path, seconds: float) -> None:
    console = Console()
    evaluated = accuracies(folder / "grpo")
    table = Table("GRPO step", "held-out accuracy", title="Problems that neither the warm-up nor GRPO trained on")
    for step, accuracy in evaluated:
        table.add_row(str(step), f"{accuracy:.1%}")
    console.print(table)
    (_, before), (_, after) = evaluated[0], evaluated[-1]
    console.print(f"before GRPO {before:.1%}, after {after:.1%} ({100 * (after - before):+.1f} points) in {seconds:.0f} s")
    last = max((folder / "grpo" / "rollouts").glob("evaluation_*.jsonl"))
    for line in last.read_text().splitlines()[:3]:
        answer = json.loads(line)
        console.print(
            f"  {answer['prompt'].strip()} {answer['response'].strip()}   (reward {answer['reward']:.2f})", highlight=False
        )
    console.print(f"run folder: {folder / 'grpo'}")
    console.print(f"exported model: {folder / 'grpo' / 'hf'}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    folder: Path = options.folder
    for part in ("model", "sft", "grpo"):
        shutil.rmtree(folder / part, ignore_errors=True)
    start = time.monotonic()
    run(sys.executable, HERE / "make_model.py", folder / "model", "--hidden", "192", "--layers", "4", "--task", "chain_sum")
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
