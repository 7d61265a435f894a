"""Synchronous against asynchronous rollouts: the same seeds, prompts and steps, responses of very unequal lengths, a real engine.

    python benchmarks/asynchronous.py --model runs/quickstart/sft/hf --engine vllm --steps 10

Five of six problems are sums of two to four numbers, the others of twelve to sixteen; worked out, they take from 10 to 150 tokens.
The model is the quickstart's (make quickstart), which adds four numbers, after some steps of supervised training on both kinds.

The tables say for each kind of run: median seconds of the steps after the first, without evaluation and checkpoints, and how many
of them training waited for responses; held-out accuracy at the end; by staleness the share of the trained tokens and the mean gap
|log trainer - log sampler| before and behind the correction (TIS).
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym
import yaml

MAKE_DATA = Path(__file__).parent.parent / "examples" / "quickstart" / "make_data.py"

KINDS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "partial": {"partial": {"step_token_budget": 48}},
    "asynchronous, finish": {"asynchronous": {"max_staleness": 1, "on_update": "finish"}},
    "asynchronous, continue": {"asynchronous": {"max_staleness": 1, "on_update": "continue"}},
}
ENGINE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "vllm": {"max_num_seqs": 32},
    "sglang": {"max_running_requests": 32},
}
NOT_TRAINING = ("evaluate", "save")


def write_problems(path: Path, size: int, seed: int, *, worked: bool) -> None:
    """Prompts and answers as JSON lines, short and long sums mixed; ``worked``: answered term by term."""
    spec = importlib.util.spec_from_file_location("make_data", MAKE_DATA)
    assert spec is not None and spec.loader is not None
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    lengths = {False: (2, 4), True: (12, 16)}
    sums = {
        long: reasoning_gym.create_dataset(
            "chain_sum", size=size, seed=seed, min_terms=low, max_terms=high, min_digits=1, max_digits=1
        )
        for long, (low, high) in lengths.items()
    }
    dice = random.Random(seed)
    with path.open("w") as file:
        for index in range(size):
            entry = sums[dice.random() < 1 / 6][index]
            answer = make_data.worked_out(entry["question"]) if worked else entry["answer"]
            file.write(json.dumps({"prompt": entry["question"], "answer": answer}) + "\n")


def prepare(options: argparse.Namespace) -> None:
    """Data, and the model after a supervised warm-up; once."""
    if (options.output / "sft" / "hf").exists():
        return
    write_problems(options.output / "sft.jsonl", 20000, 1, worked=True)
    write_problems(options.output / "train.jsonl", 3000, 2, worked=False)
    write_problems(options.output / "held_out.jsonl", 128, 3, worked=False)
    config = {
        "kind": "sft",
        "steps": options.warmup_steps,
        "model": {"path": str(options.model)},
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 5, "beta2": 0.98},
        "sft": {"examples_per_step": 128, "max_tokens": 320},
        "data": {"template": "{prompt}\n", "train": {"type": "jsonl", "path": str(options.output / "sft.jsonl")}},
        "observe": {"tensorboard": False},
    }
    train(options.output / "sft", config)


def train(run_dir: Path, config: dict[str, Any]) -> None:
    """One run in a process of its own."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | {"run_dir": str(run_dir)}, sort_keys=False))
    subprocess.run([sys.executable, "-m", "megarl.cli", "train", str(path), "--nproc", "1"], check=True)


def config_of(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One complete run; kinds differ in ``rollout`` alone."""
    held_out = {"type": "jsonl", "path": str(options.output / "held_out.jsonl")}
    server = {} if options.engine == "embedded" else {options.engine: {"arguments": ENGINE_ARGUMENTS[options.engine]}}
    return {
        "kind": "rl",
        "steps": options.steps,
        "seed": options.seed,
        "model": {"path": str(options.output / "sft" / "hf")},
        "optimizer": {"learning_rate": 1.5e-4, "warmup_steps": 4, "beta2": 0.98},
        "algorithm": {"preset": "grpo", "kl": {"place": "none", "coefficient": 0.0}, "sampler_correction": {"method": "tis"}},
        "rollout": {
            "engine": options.engine,
            "prompts_per_step": 16,
            "samples_per_prompt": 8,
            "max_prompt_tokens": 120,
            "max_new_tokens": 192,
            **server,
            **KINDS[kind],
        },
        "data": {
            "template": "{prompt}\n",
            "train": {"type": "jsonl", "path": str(options.output / "train.jsonl")},
            "exclude": [held_out],
        },
        "rewards": {"scorers": [{"type": "exact", "pattern": r"(-?\d+)\s*$"}]},
        "evaluation": {"data": held_out},
        "checkpoint": {"export": False},
        "observe": {"tensorboard": False},
    }


def run(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """Run it, unless it was run before; its log."""
    run_dir = options.output / f"{kind.replace(', ', '_')}_seed{options.seed}"
    log = run_dir / "metrics.jsonl"
    if not log.exists():
        train(run_dir, config_of(options, kind))
    return [json.loads(line) for line in log.read_text().splitlines()]


def summary(log: list[dict[str, Any]]) -> dict[str, Any]:
    """What one run took and reached."""
    steps = log[1:]
    staleness: dict[int, dict[str, float]] = {}
    for step in steps:
        counted = {k: step["metrics"].get(f"staleness/{k}_tokens") for k in range(8)}
        for k, tokens in counted.items():
            if tokens is None:
                continue
            row = staleness.setdefault(k, {"tokens": 0.0, "gap": 0.0, "corrected": 0.0})
            row["tokens"] += tokens
            row["gap"] += tokens * step["metrics"][f"staleness/{k}_gap"]
            row["corrected"] += tokens * step["metrics"].get(f"staleness/{k}_gap_corrected", 0.0)
    timed = [step["seconds"] for step in steps[1:]]  # the first has the engine's start in it

    def median(seconds_of: Callable[[dict[str, float]], float]) -> float:
        return float(np.median([seconds_of(seconds) for seconds in timed]))

    return {
        "seconds": median(lambda seconds: sum(s for name, s in seconds.items() if name not in NOT_TRAINING)),
        "waited": median(lambda seconds: seconds.get("wait", seconds.get("generate", 0.0))),
        "update": median(lambda seconds: seconds["update"] + seconds["log-probs"]),
        "start": log[0]["metrics"]["accuracy"],
        "end": steps[-1]["metrics"]["accuracy"],
        "length": float(np.mean([step["metrics"]["response_length_mean"] for step in steps])),
        "longest": float(np.mean([step["metrics"]["response_length_max"] for step in steps])),
        "staleness": staleness,
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """Two tables in Markdown."""
    lines = ["| rollouts | seconds a step | waiting | log-probs, updates | mean length | a step's longest | accuracy at the end |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind, one in results.items():
        lines.append(
            f"| {kind} | {one['seconds']:.2f} | {one['waited']:.2f} | {one['update']:.2f} | {one['length']:.0f} | "
            f"{one['longest']:.0f} | {one['end']:.1%} |"
        )
    lines += ["", "| rollouts | staleness | share of trained tokens | gap before | gap behind TIS |", "|---|---|---|---|---|"]
    for kind, one in results.items():
        total = sum(row["tokens"] for row in one["staleness"].values())
        for k, row in sorted(one["staleness"].items()):
            tokens = row["tokens"]
            lines.append(f"| {kind} | {k} | {tokens / total:.1%} | {row['gap'] / tokens:.2e} | {row['corrected'] / tokens:.2e} |")
    return "\n".join(lines)


def main() -> None:
    """Run all kinds one after the other and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the quickstart's model")
    parser.add_argument("--engine", choices=["vllm", "sglang", "embedded"], default="vllm")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warmup-steps", type=int, default=80, help="of the supervised training")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("runs/asynchronous"), help="runs there are not repeated")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    prepare(options)
    results = {kind: summary(run(options, kind)) for kind in options.kinds}
    print(f"\naccuracy at the start: {next(iter(results.values()))['start']:.1%}\n\n{report(results)}")


if __name__ == "__main__":
    main()
