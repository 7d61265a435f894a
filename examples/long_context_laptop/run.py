"""A small model finds needles in longer and longer documents: a warm-up on short ones, then GRPO in stages, on four ranks.

python examples/long_context_laptop/run.py [--seed 0] [--folder runs/long_context_laptop]
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent.parent))

from two_parts import read_lines, run

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs" / "long_context_laptop"
RANKS = "4"
DOCUMENTS = {"sft": (36, 64, 12000, 1), "train": (64, 512, 2400, 2), "held_out": (64, 512, 160, 3)}  # tokens, rows, seed


def prepare(folder: Path, seed: int) -> None:
    """Make model and documents, and train the model on documents of up to 64 tokens."""
    run(sys.executable, HERE / "make_model.py", folder / "model")
    for name, (shortest, longest, size, documents_seed) in DOCUMENTS.items():
        lengths = ("--min-tokens", str(shortest), "--max-tokens", str(longest), "--size", str(size))
        needle = ("--hops", "1", "--distractors", "0", "--digits", "2", "--seed", str(documents_seed))
        where = ("--tokenizer", folder / "model", "--template", "{prompt} ")
        run(sys.executable, HERE / "make_documents.py", folder / f"{name}.jsonl", *where, *lengths, *needle)
    files = (f"model.path={folder / 'model'}", f"data.train.path={folder / 'sft.jsonl'}")
    train("sft", folder / "sft", (*files, f"seed={seed}"))


def train(config: str, run_dir: Path, settings: tuple[str, ...]) -> None:
    """One run of ``configs/long_context_laptop/CONFIG.yaml``."""
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    megarl = Path(sys.executable).parent / "megarl"
    run(megarl, "train", CONFIGS / f"{config}.yaml", "--nproc", RANKS, "--run-dir", run_dir, *overrides)


def settings_of(folder: Path, seed: int) -> tuple[str, ...]:
    """Where the second part finds what the first has made."""
    held_out = folder / "held_out.jsonl"
    files = {"data.train.path": folder / "train.jsonl", "data.exclude.0.path": held_out, "evaluation.data.path": held_out}
    return (f"model.path={folder / 'sft' / 'hf'}", *(f"{key}={file}" for key, file in files.items()), f"seed={seed}")


def report(console: Console, run_dir: Path) -> None:
    """Print the held-out accuracies by length."""
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "accuracy" in line["metrics"]]
    names = [name for name in lines[-1]["metrics"] if name.startswith("accuracy@")]
    titles = [f"up to {name.removeprefix('accuracy@')} tokens" for name in names]
    table = Table("step", *titles, title="Held-out accuracy by the length of the prompt")
    for line in lines:
        cells = [f"{line['metrics'][name]:.1%}" if name in line["metrics"] else "" for name in names]
        table.add_row(str(line["step"]), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/long_context_laptop"))
    options = parser.parse_args()
    start = time.monotonic()
    prepare(options.folder, options.seed)
    run_dir = options.folder / "curriculum"
    train("curriculum", run_dir, settings_of(options.folder, options.seed))
    console = Console()
    report(console, run_dir)
    console.print(f"{time.monotonic() - start:.0f} s; run folder: {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell says of a command that Ctrl-C ended
