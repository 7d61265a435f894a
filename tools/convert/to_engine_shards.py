"""Model or checkpoint to the shards that the ranks of vLLM or SGLang load, each its own."""

import os
import sys

# this folder is not searched for modules: its inspect.py would hide Python's own
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != os.path.dirname(os.path.realpath(__file__))]

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from megarl.cli.command_line import Dtype, finite, progress_of_bytes, run

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A Megatron checkpoint or Hugging Face folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    engine: Annotated[Literal["vllm", "sglang"], typer.Option(help="Engine that is to load the shards.")],
    tp: Annotated[int, typer.Option(min=1, max=100_000, help="Ranks that the engine's attention is cut over.")],
    ep: Annotated[
        int, typer.Option(min=1, max=100_000, help="Ranks that its experts are distributed over; 1 cuts them over tp.")
    ] = 1,
    config: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with config.json and tokenizer.", show_default="CKPT's, or the run's model"),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the weights.", show_default="as they are")] = None,
    file_size: Annotated[
        float, typer.Option(metavar="GB", min=1e-6, max=1e6, callback=finite, help="About how large each file gets.")
    ] = 4.0,
) -> None:
    """Write the weights of CKPT as each rank's shards of an engine, with the config and tokenizer files.

    The engine starts from OUT with --load-format sharded_state and the same layout.
    OUT is OUT.partial until it is whole; the same command continues an interrupted conversion.

    \b
    Examples:
      python tools/convert/to_engine_shards.py runs/grpo/checkpoints/step_00000060 shards/grpo-60 --engine vllm --tp 2
      python tools/convert/to_engine_shards.py models/Qwen3-30B-A3B shards/Qwen3-30B-A3B --engine sglang --tp 4 --ep 4
    """
    start = time.monotonic()
    import torch

    from megarl.families.base.engine_rules import EngineLayout
    from megarl.reshard.engine_shards import write_engine_shards
    from megarl.weights.files.convert import Options

    layout = EngineLayout(engine=engine, tp=tp, ep=ep)
    options = Options(None if dtype is None else getattr(torch, dtype), int(file_size * 1e9))
    with progress_of_bytes(f"{checkpoint.name} → {output.name}") as progress:
        written = write_engine_shards(checkpoint, output, layout, config, options, progress)
    for line in written.notices:
        print(f"note: {line}")
    print(
        f"{output}: {written.num_tensors} tensors on {layout.ranks_per_engine} ranks, {written.num_bytes / 1e9:.2f} GB "
        f"in {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    run(app)
