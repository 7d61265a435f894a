"""Synchronous against asynchronous rollouts: the same seeds, prompts and steps, responses of very unequal lengths, a real engine.

    python benchmarks/asynchronous.py --model runs/quickstart/sft/hf --engine vllm --steps 12

The model is the quickstart's, warmed up on sums of four numbers (make quickstart). It is asked for sums of two to ten: it answers
at once, works them out, or goes on and on, which is the tail of the lengths. The tables say for each kind of run: seconds of the
steps after the first, without evaluation and checkpoints, and how many of them training waited for responses; held-out accuracy at
the end; by staleness the share of the trained tokens and the mean gap |log trainer - log sampler| before and behind the correction
(TIS).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

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


def config_of(options: argparse.Namespace, kind: str, run_dir: Path) -> dict[str, Any]:
    """One complete run; kinds differ in ``rollout`` alone."""
    sums = {"min_terms": 2, "max_terms": 10, "min_digits": 1, "max_digits": 1}
    held_out = {"type": "reasoning_gym", "task": "chain_sum", "size": 256, "seed": 200000, "options": sums}
    return {
        "kind": "rl",
        "steps": options.steps,
        "seed": options.seed,
        "run_dir": str(run_dir),
        "model": {"path": str(options.model)},
        "optimizer": {"learning_rate": 1.5e-4, "warmup_steps": 4, "beta2": 0.98},
        "algorithm": {"preset": "grpo", "kl": {"place": "none", "coefficient": 0.0}, "sampler_correction": {"method": "tis"}},
        "rollout": {
            "engine": options.engine,
            "prompts_per_step": 16,
            "samples_per_prompt": 8,
            "max_prompt_tokens": 120,
            "max_new_tokens": 192,
            "temperature": options.temperature,
            **({} if options.engine == "embedded" else {options.engine: {"arguments": ENGINE_ARGUMENTS[options.engine]}}),
            **KINDS[kind],
        },
        "data": {
            "template": "{prompt}\n",
            "train": {"type": "reasoning_gym", "task": "chain_sum", "size": 3000, "seed": 100000, "options": sums},
            "exclude": [held_out],
        },
        "rewards": {"scorers": [{"type": "reasoning_gym", "pattern": r"(-?\d+)\s*$"}]},
        "evaluation": {"data": held_out},
        "checkpoint": {"export": False},
        "observe": {"tensorboard": False},
    }


def run(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """Run it, unless it was run before; its log."""
    run_dir = options.output / f"{kind.replace(', ', '_')}_seed{options.seed}"
    log = run_dir / "metrics.jsonl"
    if not log.exists():
        run_dir.mkdir(parents=True)
        path = options.output / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(config_of(options, kind, run_dir), sort_keys=False))
        subprocess.run([sys.executable, "-m", "megarl.cli", "train", str(path), "--nproc", "1"], check=True)
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
    return {
        "seconds": sum(sum(s for name, s in seconds.items() if name not in NOT_TRAINING) for seconds in timed),
        "waited": sum(seconds.get("wait", seconds.get("generate", 0.0)) for seconds in timed),
        "update": sum(seconds["update"] + seconds["log-probs"] for seconds in timed),
        "start": log[0]["metrics"]["accuracy"],
        "end": steps[-1]["metrics"]["accuracy"],
        "length": float(np.mean([step["metrics"]["response_length_mean"] for step in steps])),
        "longest": float(np.mean([step["metrics"]["response_length_max"] for step in steps])),
        "staleness": staleness,
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """Two tables in Markdown."""
    lines = ["| rollouts | seconds | of them waiting | log-probs, updates | mean length | a step's longest | accuracy at the end |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind, one in results.items():
        lines.append(
            f"| {kind} | {one['seconds']:.0f} | {one['waited']:.0f} | {one['update']:.0f} | {one['length']:.0f} | "
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
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a model that can do sums a little")
    parser.add_argument("--engine", choices=["vllm", "sglang", "embedded"], default="vllm")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("runs/asynchronous"), help="runs there are not repeated")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {kind: summary(run(options, kind)) for kind in options.kinds}
    print(f"\naccuracy at the start: {next(iter(results.values()))['start']:.1%}\n\n{report(results)}")


if __name__ == "__main__":
    main()
