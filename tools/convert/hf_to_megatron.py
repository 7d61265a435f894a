"""Hugging Face folder to Megatron checkpoint (torch_dist), which any layout loads."""

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
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder with config.json and safetensors.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the weights.", show_default="as they are")] = None,
    file_size: Annotated[
        float, typer.Option(metavar="GB", min=1e-6, max=1e6, callback=finite, help="About how large each file gets.")
    ] = 4.0,
) -> None:
    """Write the weights of HF_DIR as a Megatron checkpoint (torch_dist) with the config and tokenizer files.

    OUT is OUT.partial until it is whole; the same command continues an interrupted conversion.

    \b
    Examples:
      python tools/convert/hf_to_megatron.py models/Qwen2.5-7B checkpoints/Qwen2.5-7B
      python tools/convert/hf_to_megatron.py models/Llama-3.1-8B checkpoints/llama --dtype bfloat16
    """
    start = time.monotonic()
    import torch

    from megarl.weights.files.convert import Options, hugging_face_to_megatron

    options = Options(None if dtype is None else getattr(torch, dtype), int(file_size * 1e9))
    with progress_of_bytes(f"{source.name} → {output.name}") as progress:
        written = hugging_face_to_megatron(source, output, options, progress)
    for line in written.notices:
        print(f"note: {line}")
    print(f"{output}: {written.num_tensors} tensors, {written.num_bytes / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    run(app)
