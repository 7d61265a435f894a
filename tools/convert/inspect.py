"""Show what a model folder or checkpoint holds."""

import os
import sys

# this folder is not searched for modules: its inspect.py would hide Python's own
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != os.path.dirname(os.path.realpath(__file__))]
from pathlib import Path
from typing import Annotated

import typer

from megarl.cli.command_line import run

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face folder, Megatron checkpoint or engine's shards.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show layout, family, sizes, dtypes and files of PATH, reading headers and metadata only.

    \b
    Examples:
      python tools/convert/inspect.py models/Qwen2.5-7B
      python tools/convert/inspect.py runs/grpo/checkpoints/step_00000060 --tensors
    """
    from megarl.weights.files.describe import describe, totals_by_dtype

    found = describe(path)
    print(f"{path}: {found.layout}")
    print(", ".join(f"{name} {value}" for name, value in found.facts.items()))
    for what, lines in (("weights", found.weights), ("optimizer", found.optimizer)):
        for dtype, count, elements, num_bytes in totals_by_dtype(lines):
            print(f"{what}: {count} tensors of {dtype}, {elements:,} elements, {num_bytes / 1e9:.3f} GB")
    print(f"files: {len(found.files)}, {sum(found.files.values()) / 1e9:.3f} GB")
    for name, size in found.files.items():
        print(f"  {size:>15,}  {name}")
    if tensors:
        print("tensors:")
        for line in found.weights + found.optimizer:
            chunks = f" in {line.num_chunks} chunks" if line.num_chunks > 1 else ""
            print(f"  {line.name} {list(line.shape)} {str(line.dtype).removeprefix('torch.')}{chunks}")


if __name__ == "__main__":
    run(app)
