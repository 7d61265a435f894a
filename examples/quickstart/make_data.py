"""Write warm-up examples: reasoning-gym sums, some answered at once, the others worked out term by term.

A small model answers a sum at once with little success, and worked out with much. After this warm-up it does
either; GRPO finds out which one pays.
"""

import argparse
import json
import random
import re
from pathlib import Path

import reasoning_gym

TASK = "chain_sum"


def worked_out(question: str) -> str:
    """``4 + 3 - 5`` as ``4 + 3 = 7, 7 - 5 = 2``."""
    first, *rest = re.search(r"(-?\d+(?: [+-] \d+)+) =", question)[1].split()
    total, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        steps.append(f"{total} {operator} {term} = {result}")
        total = result
    return ", ".join(steps)


def make_data(out: Path, size: int, seed: int, worked_share: float, terms: int) -> None:
    """Write ``size`` rows of prompt and answer as JSON lines."""
    options = {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": 1}
    chooser = random.Random(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for entry in reasoning_gym.create_dataset(TASK, size=size, seed=seed, **options):
            worked = chooser.random() < worked_share
            answer = worked_out(entry["question"]) if worked else entry["answer"]
            file.write(json.dumps({"prompt": entry["question"], "answer": answer}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON-lines file to write")
    parser.add_argument("--size", type=int, default=20000, help="examples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples")
    parser.add_argument("--worked-share", type=float, default=0.5, help="share of examples that are worked out")
    parser.add_argument("--terms", type=int, default=4, help="numbers in each sum")
    arguments = parser.parse_args()
    make_data(arguments.out, arguments.size, arguments.seed, arguments.worked_share, arguments.terms)
    print(f"{arguments.out}: {arguments.size} examples")


if __name__ == "__main__":
    main()
