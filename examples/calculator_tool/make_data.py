"""Write warm-up examples: sums of large numbers, some answered at once, the others with a call of a calculator.

A call takes two turns, so it is two examples: the call as the answer to the question, and the result as the answer to question,
call and what the calculator said. What the calculator says is part of a prompt, so that the model does not learn to foretell it.
"""

import argparse
import json
import random
import re
from pathlib import Path

import reasoning_gym

TASK = "chain_sum"
OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}
HELD_OUT = {"size": 256, "seed": 200000}  # the problems that GRPO is evaluated on


def call(question: str) -> str:
    """``... 417 + 832 =`` as ``[417 + 832]``."""
    return f"[{re.search(r'(-?[0-9]+(?: [+-] [0-9]+)+) =', question)[1]}]"


def make_data(out: Path, size: int, seed: int, called_share: float) -> None:
    """Write rows of prompt and answer for ``size`` problems as JSON lines."""
    chooser = random.Random(seed)
    held_out = {entry["question"] for entry in reasoning_gym.create_dataset(TASK, **HELD_OUT, **OPTIONS)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for entry in reasoning_gym.create_dataset(TASK, size=size, seed=seed, **OPTIONS):
            question, answer = entry["question"], entry["answer"]
            if question in held_out:
                continue
            rows = [(question, answer)]
            if chooser.random() < called_share:
                # as rollout.environment.observation_template and data.template write it; <eos> is the end of the policy's turn
                rows = [(question, call(question)), (f"{question}\n{call(question)}<eos>{answer}", answer)]
            for prompt, response in rows:
                file.write(json.dumps({"prompt": prompt, "answer": response}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON-lines file to write")
    parser.add_argument("--size", type=int, default=20000, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    parser.add_argument("--called-share", type=float, default=0.5, help="share of problems that call the calculator")
    arguments = parser.parse_args()
    make_data(arguments.out, arguments.size, arguments.seed, arguments.called_share)
    print(f"{arguments.out}: examples of {arguments.size} problems")


if __name__ == "__main__":
    main()
