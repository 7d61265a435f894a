"""Megatron checkpoint (torch_dist) to Hugging Face folder."""

import os
import sys

# this folder is not searched for modules: its inspect.py would hide Python's own
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != os.path.dirname(os.path.realpath(__file__))]

import time
from pathlib import Path
from typing import Annotated

import typer

from megarl.cli.command_line import Dtype, finite, progress_of_bytes, run

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoints/step_… of a run, or any torch_dist folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with config.json and tokenizer.", show_default="CKPT's, or the run's model"),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the weights.", show_default="as they are")] = None,
    file_size: Annotated[
        float, typer.Option(metavar="GB", min=1e-6, max=1e6, callback=finite, help="About how large each file gets.")
    ] = 4.0,
) -> None:
    """Write the weights of CKPT as safetensors with index, config and tokenizer files.

    OUT is OUT.partial until it is whole; the same command continues an interrupted conversion.

    \b
    Examples:
      python tools/convert/megatron_to_hf.py runs/grpo/checkpoints/step_00000060 models/grpo-60
      python tools/convert/megatron_to_hf.py checkpoints/Qwen2.5-7B models/again --dtype bfloat16
      python tools/convert/megatron_to_hf.py /data/iter_0001000 models/new --config models/Qwen2.5-7B
    """
    start = time.monotonic()
    import torch

    from megarl.weights.files.convert import Options, megatron_to_hugging_face

    options = Options(None if dtype is None else getattr(torch, dtype), int(file_size * 1e9))
    with progress_of_bytes(f"{checkpoint.name} → {output.name}") as progress:
        written = megatron_to_hugging_face(checkpoint, output, config, options, progress)
    print(f"{output}: {written.num_tensors} tensors, {written.num_bytes / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    run(app)
