"""Write warm-up examples for the towers of Hanoi: at each state of the solution the next move, or sometimes another legal one.

python examples/quickstart/make_model.py runs/tower_of_hanoi/model --hidden 128 --layers 4 --task tower_of_hanoi
python examples/tower_of_hanoi/make_data.py runs/tower_of_hanoi/sft.jsonl
megarl train configs/tower_of_hanoi/sft.yaml
megarl train configs/tower_of_hanoi/grpo.yaml
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import reasoning_gym

from megarl.builtin.environments.tower_of_hanoi import TowerOfHanoi

OPTIONS = {"min_disks": 2, "max_disks": 3, "min_pegs": 3, "max_pegs": 3}


def legal_moves(task: Any, entry: dict[str, Any], moves: list[str]) -> list[str]:
    """By asking the task's verifier about every move."""
    puzzle = entry["metadata"]
    pegs = range(1, puzzle["num_pegs"] + 1)
    candidates = [
        f"Move disk {disk} from Peg {start} to Peg {target}"
        for disk in range(1, puzzle["num_disks"] + 1)
        for start, target in itertools.permutations(pegs, 2)
    ]
    return [move for move in candidates if task.score_answer("\n".join([*moves, move]), entry) > 0]


def make_data(out: Path, size: int, seed: int, other_share: float) -> None:
    """Write one row for each move of ``size`` puzzles as JSON lines."""
    chooser = random.Random(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    task = reasoning_gym.create_dataset("tower_of_hanoi", size=size, seed=seed, **OPTIONS)
    with out.open("w") as file:
        for entry in task:
            game, moves = TowerOfHanoi(), []
            # as rollout.environment.observation_template and data.template write it; <eos> is the end of the policy's turn
            prompt = f"{entry['question']}\n{game.reset('', {'task': 'tower_of_hanoi', 'entry': entry}, 0)}"
            for move in entry["answer"].split("\n"):
                other = chooser.random() < other_share
                answer = chooser.choice(legal_moves(task, entry, moves)) if other else move
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
                prompt += f"\n{move}<eos>{game.step(move)[0]}"
                moves.append(move)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON-lines file to write")
    parser.add_argument("--size", type=int, default=400, help="puzzles")
    parser.add_argument("--seed", type=int, default=0, help="seed of the puzzles")
    parser.add_argument("--other-share", type=float, default=0.3, help="share of moves that are another legal one")
    arguments = parser.parse_args()
    make_data(arguments.out, arguments.size, arguments.seed, arguments.other_share)
    print(f"{arguments.out}: moves of {arguments.size} puzzles")


if __name__ == "__main__":
    main()
