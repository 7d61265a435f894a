"""Compare two models on disk tensor by tensor, whatever formats they are in."""

import os
import sys

# this folder is not searched for modules: its inspect.py would hide Python's own
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != os.path.dirname(os.path.realpath(__file__))]

from pathlib import Path
from typing import Annotated

import typer

from megarl.cli.command_line import progress_of_bytes, run

SHOWN = 20  # differences, without --all

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    first: Annotated[Path, typer.Argument(metavar="A", help="A Hugging Face folder, Megatron checkpoint or engine's shards.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with config.json, for Megatron checkpoints without one.")
    ] = None,
    cast: Annotated[bool, typer.Option("--cast", help="Accept another dtype in B if its values are A's cast to it.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help=f"List all differences instead of {SHOWN}.")] = False,
) -> None:
    """Compare every tensor of A and B, bit for bit; exit 1 with a list when they differ.

    Both digests are over names, dtypes, shapes and bytes, so the same weights have the same digest in every format.

    \b
    Examples:
      python tools/convert/verify.py models/Qwen2.5-7B checkpoints/Qwen2.5-7B
      python tools/convert/verify.py models/Qwen2.5-7B models/Qwen2.5-7B-float32 --cast
    """
    from megarl.weights.files.compare import compare
    from megarl.weights.files.model_folder import open_model

    models = open_model(first, config), open_model(second, config)
    with progress_of_bytes(f"{first.name} and {second.name}") as progress:
        result = compare(*models, cast=cast, progress=progress)
    for letter, path, model, side in zip("AB", (first, second), models, (result.first, result.second), strict=True):
        print(f"{letter} {path}: {model.layout}, {side.num_tensors} tensors, {side.num_bytes} bytes, sha256 {side.digest}")
    if result.ignored:
        print(f"not compared, as the model does not take them: {', '.join(result.ignored)}")
    if not result.differences:
        print("equal" if not cast else "equal after casting A to B's dtypes")
        return
    for difference in result.differences if show_all else result.differences[:SHOWN]:
        print(f"{difference.name}: {difference.reason}")
    print(f"{len(result.differences)} tensors differ")
    raise typer.Exit(1)


if __name__ == "__main__":
    run(app)
