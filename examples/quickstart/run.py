"""The quickstart: a small model from random weights, a supervised warm-up, then GRPO, on two ranks of this machine.

python examples/quickstart/run.py [--seed 0] [--folder runs/quickstart]
"""

import sys
from pathlib import Path

from rich.console import Console

sys.path.append(str(Path(__file__).parent.parent))

from two_parts import report, train


def main() -> None:
    folder, seconds = train("quickstart", hidden=192)
    console = Console()
    for answer in report(console, folder, seconds)[:3]:
        console.print(
            f"  {answer['prompt'].strip()} {answer['response'].strip()}   (reward {answer['reward']:.2f})", highlight=False
        )
    console.print(f"run folder: {folder / 'grpo'}")
    console.print(f"exported model: {folder / 'grpo' / 'hf'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell says of a command that Ctrl-C ended
