"""Growing context against the final length alone, and against a curriculum without retrospective sampling, at equal tokens.

    python benchmarks/curriculum.py [--seeds 0 1 2] [--folder runs/long_context_laptop] [--plot docs/curriculum.svg]

The model, the documents and the warm-up are those of examples/long_context_laptop. The prompt tokens that the progressive run of a
seed reads are the budget of that seed: the other runs get steps for as many. Prints two tables, and plots held-out accuracy over
the tokens read: of every run on the longest documents, and by length of the first seed.
"""

import argparse
import json
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.append(str(Path(__file__).parent.parent / "examples" / "long_context_laptop"))

from run import CONFIGS, prepare, read_lines, settings_of, train

KINDS = ("progressive", "no retrospective sampling", "final length only")
CONFIG: dict[str, Any] = yaml.safe_load((CONFIGS / "curriculum.yaml").read_text())
STAGES: list[dict[str, Any]] = CONFIG["curriculum"]["stages"]
RANGES = list(pairwise([0, *(stage["max_prompt_tokens"] for stage in STAGES)]))  # prompts are above and up to so many tokens
NUM_SAMPLES: int = CONFIG["rollout"]["prompts_per_step"] * CONFIG["rollout"]["samples_per_prompt"]


class Trained:
    """A run that has ended: what it read and how it did.

    Attributes:
        tokens: of the prompts that it had read after each step, from step 0.
        evaluations: metrics at each step that ended with one.
        stage_ends: steps after which a stage but the last was over.
    """

    def __init__(self, run_dir: Path) -> None:
        rollouts = run_dir / "rollouts"
        steps = [sum(row["prompt_tokens"] for row in read_lines(file)) for file in sorted(rollouts.glob("step_*.jsonl"))]
        self.tokens = [0, *accumulate(steps)]
        lines = {line["step"]: line["metrics"] for line in read_lines(run_dir / "metrics.jsonl")}
        self.evaluations = {step: metrics for step, metrics in lines.items() if "accuracy" in metrics}
        stages = [metrics.get("curriculum/stage") for step, metrics in lines.items() if step]
        self.stage_ends = [step for step, (one, other) in enumerate(pairwise(stages), start=1) if one != other]

    def accuracy(self, step: int, stage: str) -> float:
        """On held-out prompts of a stage's lengths; NaN where none was asked. A run without stages has those of the last."""
        metrics = self.evaluations[step]
        if any(name.startswith("accuracy@") for name in metrics):
            return float(metrics.get(f"accuracy@{stage}", "nan"))
        return float(metrics["accuracy"]) if stage == STAGES[-1]["name"] else float("nan")

    def curve(self, stage: str) -> tuple[list[float], list[float]]:
        """Millions of tokens read, and accuracy on prompts of a stage's lengths, at each evaluation that had some."""
        points = [(self.tokens[step] / 1e6, self.accuracy(step, stage)) for step in self.evaluations]
        points = [point for point in points if not np.isnan(point[1])]
        return [tokens for tokens, _ in points], [accuracy for _, accuracy in points]


def steps_for(folder: Path, tokens: float, stage: int) -> int:
    """Steps on a stage's own documents that read about so many tokens."""
    above, longest = RANGES[stage]
    lengths = [row["length"] for row in read_lines(folder / "train.jsonl")]
    return round(tokens / (NUM_SAMPLES * float(np.mean([length for length in lengths if above < length <= longest]))))


def run_kind(folder: Path, kind: str, seed: int) -> Trained:
    """One run, unless it was made before."""
    run_dir = folder / f"{kind.replace(' ', '_')}_seed{seed}"
    if not (run_dir / "hf").exists():
        settings = settings_of(folder, seed)
        if kind != "progressive":
            settings += (without_retrospective if kind.startswith("no") else final_length_only)(folder, seed)
        train("curriculum", run_dir, settings)
    return Trained(run_dir)


def without_retrospective(folder: Path, seed: int) -> tuple[str, ...]:
    """Settings for a curriculum whose stages read as many tokens as those of the progressive run."""
    progressive = run_kind(folder, "progressive", seed)
    ends = [progressive.tokens[step] for step in (0, *progressive.stage_ends, -1)]
    steps = [steps_for(folder, after - before, stage) for stage, (before, after) in enumerate(pairwise(ends))]
    settings = [f"steps={sum(steps)}", "curriculum.retrospective_share=0"]
    for number, count in enumerate(steps):
        settings += [f"curriculum.stages.{number}.steps={count}", f"curriculum.stages.{number}.promotion=null"]
    return tuple(settings)


def final_length_only(folder: Path, seed: int) -> tuple[str, ...]:
    """Settings for a run on the longest documents in the layout of the last stage."""
    above, longest = RANGES[-1]
    settings = [
        f"steps={steps_for(folder, run_kind(folder, 'progressive', seed).tokens[-1], stage=-1)}",
        "curriculum=null",
        f"rollout.max_prompt_tokens={longest}",
        *(f"policy.parallel.{name}={value}" for name, value in STAGES[-1]["changes"]["policy"]["parallel"].items()),
    ]
    for name, key in (("train", "data.train"), ("held_out", "evaluation.data")):
        rows = [row for row in read_lines(folder / f"{name}.jsonl") if above < row["length"] <= longest]
        file = folder / f"{name}_longest.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings.append(f"{key}.path={file}")
    return tuple(settings)


def print_results(folder: Path, runs: dict[tuple[str, int], Trained], seeds: list[int]) -> None:
    """Accuracy by length at equal tokens, and how the stages followed each other."""
    names = [stage["name"] for stage in STAGES]
    print("\n| | seed | stages end after steps | steps | million prompt tokens |", end="")
    print("".join(f" {above + 1} to {longest} tokens |" for above, longest in RANGES))
    print("|---" * (5 + len(names)) + "|")
    for kind in KINDS:
        for seed in seeds:
            run = runs[kind, seed]
            step = max(run.evaluations)
            accuracies = [run.accuracy(step, name) for name in names]
            cells = [f"{accuracy:.1%}" if not np.isnan(accuracy) else "" for accuracy in accuracies]
            ends = ", ".join(map(str, run.stage_ends))
            print("|", " | ".join((kind, str(seed), ends, str(step), f"{run.tokens[step] / 1e6:.3f}", *cells)), "|")
    above, longest = RANGES[-1]
    lengths = [row["length"] for row in read_lines(folder / "held_out.jsonl")]
    number = sum(above < length <= longest for length in lengths)
    print(f"\n| | mean of {len(seeds)} seeds, {number} longest documents | standard error over seeds |\n|---|---|---|")
    for kind in KINDS:
        last = [runs[kind, seed].accuracy(max(runs[kind, seed].evaluations), names[-1]) for seed in seeds]
        error = np.std(last, ddof=1) / len(last) ** 0.5 if len(last) > 1 else float("nan")
        print(f"| {kind} | {np.mean(last):.1%} | {error:.1%} |")


def plot(runs: dict[tuple[str, int], Trained], seeds: list[int], out: Path) -> None:
    """Draw both."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for number, kind in enumerate(KINDS):
        for seed in seeds:
            label = kind if seed == seeds[0] else None
            left.plot(*runs[kind, seed].curve(STAGES[-1]["name"]), f"C{number}o-", label=label, markersize=3, alpha=0.8)
    first = runs["progressive", seeds[0]]
    for number, (stage, begin) in enumerate(zip(STAGES, [0, *first.stage_ends], strict=True)):
        above, longest = RANGES[number]
        label = f"{above + 1} to {longest} tokens"
        right.plot(*first.curve(stage["name"]), f"C{number + len(KINDS)}o-", label=label, markersize=3)
        tokens = first.tokens[begin] / 1e6
        right.axvline(tokens, color="grey", linestyle=":")
        right.text(tokens, 1.03 - 0.06 * number, f" stage {stage['name']}", color="grey", fontsize=8)
    left.set(
        title="Longest documents, every seed", xlabel="prompt tokens read, millions", ylabel="held-out accuracy", ylim=(0, 1.1)
    )
    right.set(title=f"Progressive, by length, seed {seeds[0]}")
    for axes in (left, right):
        axes.set_xlabel("prompt tokens read, millions")
        axes.legend()
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/long_context_laptop"))
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    options = parser.parse_args()
    if not (options.folder / "sft" / "hf").exists():
        prepare(options.folder, seed=0)
    runs = {(kind, seed): run_kind(options.folder, kind, seed) for seed in options.seeds for kind in KINDS}
    print_results(options.folder, runs, options.seeds)
    if options.plot:
        plot(runs, options.seeds, options.plot)


if __name__ == "__main__":
    main()
