"""Write preference pairs: sums of reasoning-gym, worked out and right against answered at once and wrong.

    python examples/preference/make_pairs.py runs/preference

writes train.jsonl and held_out.jsonl there, the latter of the problems that the quickstart evaluates on.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import reasoning_gym

sys.path.append(str(Path(__file__).parent.parent / "quickstart"))

from make_data import TASK, worked_out

SUMS = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}


def make_pairs(out: Path, size: int, seed: int, excluded: set[str]) -> set[str]:
    """Write a pair for each of ``size`` problems whose question is not excluded; returns the questions."""
    chooser = random.Random(seed)
    questions = set()
    with out.open("w") as file:
        for entry in reasoning_gym.create_dataset(TASK, size=size, seed=seed, **SUMS):
            wrong = int(entry["answer"]) + chooser.choice((-3, -2, -1, 1, 2, 3))
            if entry["question"] not in excluded:
                questions.add(entry["question"])
                pair = {"prompt": entry["question"], "chosen": worked_out(entry["question"]), "rejected": str(wrong)}
                file.write(json.dumps(pair) + "\n")
    return questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    held_out = make_pairs(folder / "held_out.jsonl", 256, 200000, set())
    train = make_pairs(folder / "train.jsonl", 2000, 100000, held_out)
    print(f"{folder}: {len(train)} different problems to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
