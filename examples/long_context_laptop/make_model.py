"""Write a small Qwen2 model with random weights and a tokenizer fitted to the words of the synthetic documents."""

import argparse
import random
import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from make_documents import NAMES, OBJECTS, SHORT, SUBJECTS, VERBS
from quickstart.make_model import make_model

NUM_TEXTS = 3000


def corpus() -> list[str]:
    """Texts with the words of the documents and questions."""
    chooser = random.Random(0)
    sentences = [f"The {one} {verb} the {other}." for one, verb, other in product(SUBJECTS, VERBS, OBJECTS)]
    return [
        " ".join(
            (*chooser.sample(sentences, 3), f"The code of {chooser.choice(NAMES)} is {chooser.randrange(1000, 9999)}.", *SHORT)
        )
        + f"\nWhat is the code of {chooser.choice(NAMES)}?"
        for _ in range(NUM_TEXTS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    num_parameters = make_model(out, layers=4, intermediate=384, corpus=corpus())
    print(f"{out}: {num_parameters:,} parameters")


if __name__ == "__main__":
    main()
