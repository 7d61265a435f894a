"""A small model learns to use a calculator: a supervised warm-up that shows calls, then GRPO with the calculator at hand.

python examples/calculator_tool/run.py [--seed 0] [--folder runs/calculator_tool]
"""

import sys
from pathlib import Path

from rich.console import Console

sys.path.append(str(Path(__file__).parent.parent))

from two_parts import report, train


def main() -> None:
    folder, seconds = train("calculator_tool", hidden=128)
    console = Console()
    answer = report(console, folder, seconds, {"turns_mean": "turns in training"})[0]
    console.print(f"  prompt: {answer['prompt'].strip()}", highlight=False, markup=False)
    for turn in answer["turns"]:
        ((speaker, text),) = turn.items()
        console.print(f"  {speaker}: {text}", highlight=False, markup=False)
    console.print(f"run folder: {folder / 'grpo'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell says of a command that Ctrl-C ended
