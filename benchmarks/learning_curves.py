"""Every method learns: each file of configs/laptop on a smaller model and shorter sums, three seeds, one table and one plot.

    python benchmarks/learning_curves.py [--folder runs/learning_curves] [--seeds 0 1 2] [--methods dapo ppo] [--jobs 2]

The model (0.45 million parameters) first learns sums of three numbers, some answered at once, some worked out. From there each
method goes on for 30 steps on one rank. What is finished in the folder is kept, so that a second call runs what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
SUMS = "{min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}"
SHORTER = "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
TASKS = ", ".join(
    f"{{name: {name}, source: {{type: reasoning_gym, task: chain_sum, size: {size}, seed: 100000, options: {options}}}}}"
    for name, size, options in (("two", 500, SHORTER), ("three", 3000, SUMS))
)
HELD_OUT = f"{{type: reasoning_gym, task: chain_sum, size: 512, seed: 200000, options: {SUMS}}}"
COLUMNS = 4  # of the plot

Curve = list[tuple[int, float]]


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run it on one core; what it prints goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([str(part) for part in command], check=True, stdout=output, stderr=output, env=environment)


def train(config: Path, run_dir: Path, settings: Mapping[str, object]) -> None:
    """One run of megarl train on one rank; one that is finished is left alone, one that is not starts anew."""
    if (run_dir / "hf").exists():
        return
    if (run_dir / "metrics.jsonl").exists():
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.interrupted-{os.getpid()}"))
    overrides = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    megarl = Path(sys.executable).parent / "megarl"
    run([megarl, "train", config, "--nproc", "1", "--run-dir", run_dir, *overrides], run_dir.with_suffix(".log"))


def warmed_up_model(folder: Path) -> Path:
    """The model that all methods start from, as a Hugging Face folder."""
    sizes = ("--hidden", "96", "--layers", "3", "--intermediate", "384", "--task", "chain_sum")
    run([sys.executable, QUICKSTART / "make_model.py", folder / "model", *sizes], folder / "model.log")
    run([sys.executable, QUICKSTART / "make_data.py", folder / "sft.jsonl", "--terms", "3"], folder / "data.log")
    settings = {
        "model.path": folder / "model",
        "policy.parallel.tp": 1,
        "steps": 400,
        "data.train.path": folder / "sft.jsonl",
        "data.exclude": f"[{HELD_OUT}]",
        "observe.progress": "false",
    }
    train(ROOT / "configs" / "quickstart" / "sft.yaml", folder / "sft", settings)
    return folder / "sft" / "hf"


def learn(method: str, seed: int, model: Path, folder: Path) -> None:
    """One method, one seed."""
    trained = {"data.train.tasks": f"[{TASKS}]"} if method == "aepo" else {"data.train.options": SUMS}  # aepo takes a mixture
    settings = {
        "model.path": model,
        "seed": seed,
        "steps": 30,
        "optimizer.learning_rate": 3e-4,
        "rollout.max_new_tokens": 32,
        "rollout.embedded.threads": 1,
        "data.exclude": f"[{HELD_OUT}]",
        "evaluation.data": HELD_OUT,
        "evaluation.every": 5,
        "observe.progress": "false",
        **trained,
    }
    train(ROOT / "configs" / "laptop" / f"{method}.yaml", folder / f"{method}-{seed}", settings)
    print(f"{method}, seed {seed}: " + ", ".join(f"{accuracy:.1%}" for _, accuracy in curve(folder, method, seed)), flush=True)


def curve(folder: Path, method: str, seed: int) -> Curve:
    """Held-out accuracy by step."""
    lines = [json.loads(line) for line in (folder / f"{method}-{seed}" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["metrics"]["accuracy"]) for line in lines if "accuracy" in line["metrics"]]


def table(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Markdown, accuracies in percent."""
    rows = ["| method | start | end, by seed | least gain in points |", "|---|---|---|---|"]
    for method, by_seed in curves.items():
        gains = [100 * (one[-1][1] - one[0][1]) for one in by_seed]
        starts = sorted({f"{one[0][1]:.1%}" for one in by_seed})
        ends = ", ".join(f"{one[-1][1]:.1%}" for one in by_seed)
        rows.append(f"| `{method}` | {' to '.join(starts[:: max(1, len(starts) - 1)])} | {ends} | {min(gains):+.1f} |")
    return "\n".join(rows)


def plot(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """One small plot for each method, one line for each seed."""
    pyplot.rcParams["svg.hashsalt"] = "megarl"  # equal curves give an equal file
    num_rows = -(-len(curves) // COLUMNS)
    figure, grid = pyplot.subplots(num_rows, COLUMNS, figsize=(10, 2 * num_rows), sharex=True, sharey=True, squeeze=False)
    for place in grid.flat[len(curves) :]:
        place.axis("off")
    for place, (method, by_seed) in zip(grid.flat, curves.items(), strict=False):
        for one in by_seed:
            place.plot([step for step, _ in one], [100 * accuracy for _, accuracy in one], linewidth=1)
        place.set_title(method, fontsize=9)
        place.grid(linewidth=0.3)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("held-out accuracy, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, print the table, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = sorted(path.stem for path in (ROOT / "configs" / "laptop").glob("*.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/learning_curves"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    model = warmed_up_model(folder)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [pool.submit(learn, method, seed, model, folder) for seed in arguments.seeds for method in arguments.methods]
        for one in runs:
            one.result()
    curves = {method: [curve(folder, method, seed) for seed in arguments.seeds] for method in arguments.methods}
    print(table(curves))
    plot(curves, folder / "learning_curves.svg")
    print(f"plot: {folder / 'learning_curves.svg'}")


if __name__ == "__main__":
    main()
