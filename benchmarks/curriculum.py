"""Growing context against the final length alone, and against a curriculum without retrospective sampling.

    python benchmarks/curriculum.py [--seeds 0 1 2] [--folder runs/long_context_laptop] [--plot docs/curriculum.svg]

The model and the documents are those of examples/long_context_laptop; the warm-up is shared. "final length only" has as many steps
on the longest documents as read the tokens of the progressive run. Prints a table, and plots held-out accuracy on the longest
documents, and of the first seed on all lengths, over the tokens read.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.append(str(Path(__file__).parent.parent / "examples" / "long_context_laptop"))

from run import CONFIGS, prepare, read_lines, settings_of, train

KINDS = ("progressive", "no retrospective sampling", "final length only")


def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIGS / "curriculum.yaml").read_text())
    return loaded


def ranges() -> list[tuple[int, int]]:
    """Prompt lengths of the stages: above and up to so many tokens."""
    ends = [0, *(stage["max_prompt_tokens"] for stage in config()["curriculum"]["stages"])]
    return list(pairwise(ends))


def mean_lengths(folder: Path) -> list[float]:
    """Mean prompt length of each stage's own documents."""
    lengths = np.array([row["length"] for row in read_lines(folder / "train.jsonl")])
    return [float(lengths[(lengths > above) & (lengths <= end)].mean()) for above, end in ranges()]


def tokens_of_steps(folder: Path, kind: str) -> list[float]:
    """Tokens of prompts that each step reads, in the mean."""
    means, settings = mean_lengths(folder), config()
    per_step = settings["rollout"]["prompts_per_step"] * settings["rollout"]["samples_per_prompt"]
    stages = [stage["steps"] for stage in settings["curriculum"]["stages"]]
    share = settings["curriculum"]["retrospective_share"]
    staged = []
    for number, (steps, mean) in enumerate(zip(stages, means, strict=True)):
        earlier = float(np.mean(means[:number])) if number else mean
        mixed = share * earlier + (1 - share) * mean if kind == "progressive" else mean
        staged += [per_step * mixed] * steps
    if kind != "final length only":
        return staged
    return [per_step * means[-1]] * round(sum(tokens_of_steps(folder, "progressive")) / (per_step * means[-1]))


def run_kind(folder: Path, kind: str, seed: int) -> Path:
    """One run, unless it was made before."""
    run_dir = folder / f"{kind.replace(' ', '_')}_seed{seed}"
    if (run_dir / "hf").exists():
        return run_dir
    settings = settings_of(folder, seed)
    if kind == "no retrospective sampling":
        settings = (*settings, "curriculum.retrospective_share=0")
    if kind == "final length only":
        above, longest = ranges()[-1]
        for name in ("train", "held_out"):
            rows = [row for row in read_lines(folder / f"{name}.jsonl") if above < row["length"] <= longest]
            (folder / f"{name}_longest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        final = config()["curriculum"]["stages"][-1]["changes"]["policy"]["parallel"]
        settings = (
            *settings,
            f"data.train.path={folder / 'train_longest.jsonl'}",
            f"evaluation.data.path={folder / 'held_out_longest.jsonl'}",
            f"steps={len(tokens_of_steps(folder, kind))}",
            "curriculum=null",
            f"rollout.max_prompt_tokens={longest}",
            *(f"policy.parallel.{name}={value}" for name, value in final.items()),
        )
    train("curriculum", run_dir, settings)
    return run_dir


def curve(folder: Path, kind: str, seed: int, name: str) -> tuple[list[float], list[float]]:
    """Tokens read so far, and accuracy, at each evaluation that has the metric."""
    read = np.concatenate([[0.0], np.cumsum(tokens_of_steps(folder, kind))])
    lines = [line for line in read_lines(run_kind(folder, kind, seed) / "metrics.jsonl") if name in line["metrics"]]
    return [float(read[line["step"]]) for line in lines], [line["metrics"][name] for line in lines]


def name_of_longest(kind: str) -> str:
    return "accuracy" if kind == "final length only" else f"accuracy@{config()['curriculum']['stages'][-1]['name']}"


def plot(folder: Path, seeds: list[int], out: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for number, kind in enumerate(KINDS):
        for seed in seeds:
            tokens, accuracies = curve(folder, kind, seed, name_of_longest(kind))
            left.plot(np.array(tokens) / 1e6, accuracies, f"C{number}o-", label=kind if seed == seeds[0] else None, alpha=0.8)
    stages = config()["curriculum"]["stages"]
    for number, stage in enumerate(stages):
        tokens, accuracies = curve(folder, KINDS[0], seeds[0], f"accuracy@{stage['name']}")
        right.plot(np.array(tokens) / 1e6, accuracies, f"C{number + 3}o-", label=f"up to {stage['max_prompt_tokens']} tokens")
    ends = np.cumsum([stage["steps"] for stage in stages])
    read = np.cumsum(tokens_of_steps(folder, KINDS[0])) / 1e6
    for end in ends[:-1]:
        right.axvline(read[end - 1], color="grey", linestyle=":")
    left.set(
        title="Longest documents, every seed", xlabel="prompt tokens read, millions", ylabel="held-out accuracy", ylim=(0, 1.02)
    )
    right.set(title=f"Progressive, by length, seed {seeds[0]}", xlabel="prompt tokens read, millions")
    left.legend()
    right.legend()
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
    rows = []
    for kind in KINDS:
        ends = [curve(options.folder, kind, seed, name_of_longest(kind))[1][-1] for seed in options.seeds]
        tokens = sum(tokens_of_steps(options.folder, kind)) / 1e6
        cells = " | ".join(f"{end:.1%}" for end in ends)
        rows.append(f"| {kind} | {len(tokens_of_steps(options.folder, kind))} | {tokens:.2f} | {cells} | {np.mean(ends):.1%} |")
    titles = " | ".join(f"seed {seed}" for seed in options.seeds)
    print(f"\n| | steps | million prompt tokens | {titles} | mean |\n|---|---|---|{'---|' * (len(options.seeds) + 1)}")
    print("\n".join(rows))
    if options.plot:
        plot(options.folder, options.seeds, options.plot)


if __name__ == "__main__":
    main()
