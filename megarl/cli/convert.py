"""``megarl convert``: models between Hugging Face folders, Megatron checkpoints and engines' shards."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from megarl.cli.command_line import Dtype, finite, progress_of_bytes

SHOWN = 20  # differences, without --all

convert_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Convert models between Hugging Face folders, Megatron checkpoints and engines' shards.",
)

CastTo = Annotated[Dtype | None, typer.Option(help="Cast the weights.", show_default="as they are")]
FileSize = Annotated[float, typer.Option(metavar="GB", min=1e-6, max=1e6, callback=finite, help="About how large each file gets.")]
ConfigFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with config.json and tokenizer.", show_default="CKPT's, or the run's model"),
]


def alone(command: Callable[..., None]) -> typer.Typer:
    """Return one command as an application of its own, for a script in ``tools/convert/``."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    return app


@convert_app.command()
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder with config.json and safetensors.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    dtype: CastTo = None,
    file_size: FileSize = 4.0,
) -> None:
    """Write the weights of HF_DIR as a Megatron checkpoint (torch_dist) with the config and tokenizer files.

    OUT is OUT.partial until it is whole; the same command continues an interrupted conversion.

    \b
    Examples:
      megarl convert hf-to-megatron models/Qwen2.5-7B checkpoints/Qwen2.5-7B
      megarl convert hf-to-megatron models/Llama-3.1-8B checkpoints/llama --dtype bfloat16
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


@convert_app.command()
def megatron_to_hf(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoints/step_… of a run, or any torch_dist folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    config: ConfigFolder = None,
    dtype: CastTo = None,
    file_size: FileSize = 4.0,
) -> None:
    """Write the weights of CKPT as safetensors with index, config and tokenizer files.

    OUT is OUT.partial until it is whole; the same command continues an interrupted conversion.

    \b
    Examples:
      megarl convert megatron-to-hf runs/grpo/checkpoints/step_00000060 models/grpo-60
      megarl convert megatron-to-hf checkpoints/Qwen2.5-7B models/again --dtype bfloat16
      megarl convert megatron-to-hf /data/iter_0001000 models/new --config models/Qwen2.5-7B
    """
    start = time.monotonic()
    import torch

    from megarl.weights.files.convert import Options, megatron_to_hugging_face

    options = Options(None if dtype is None else getattr(torch, dtype), int(file_size * 1e9))
    with progress_of_bytes(f"{checkpoint.name} → {output.name}") as progress:
        written = megatron_to_hugging_face(checkpoint, output, config, options, progress)
    print(f"{output}: {written.num_tensors} tensors, {written.num_bytes / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")


@convert_app.command()
def to_engine_shards(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A Megatron checkpoint or Hugging Face folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    engine: Annotated[Literal["vllm", "sglang"], typer.Option(help="Engine that is to load the shards.")],
    tp: Annotated[int, typer.Option(min=1, max=100_000, help="Ranks that the engine's attention is cut over.")],
    ep: Annotated[
        int, typer.Option(min=1, max=100_000, help="Ranks that its experts are distributed over; 1 cuts them over tp.")
    ] = 1,
    config: ConfigFolder = None,
    dtype: CastTo = None,
    file_size: FileSize = 4.0,
) -> None:
    """Write the weights of CKPT as each rank's shards of an engine, with the config and tokenizer files.

    The engine starts from OUT with --load-format sharded_state and the same layout.
    OUT is OUT.partial until it is whole; the same command continues an interrupted conversion.

    \b
    Examples:
      megarl convert to-engine-shards runs/grpo/checkpoints/step_00000060 shards/grpo-60 --engine vllm --tp 2
      megarl convert to-engine-shards models/Qwen3-30B-A3B shards/Qwen3-30B-A3B --engine sglang --tp 4 --ep 4
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


@convert_app.command()
def verify(
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
      megarl convert verify models/Qwen2.5-7B checkpoints/Qwen2.5-7B
      megarl convert verify models/Qwen2.5-7B models/Qwen2.5-7B-float32 --cast
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


@convert_app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face folder, Megatron checkpoint or engine's shards.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show layout, family, sizes, dtypes and files of PATH, reading headers and metadata only.

    \b
    Examples:
      megarl convert inspect models/Qwen2.5-7B
      megarl convert inspect runs/grpo/checkpoints/step_00000060 --tensors
    """
    from megarl.weights.files.describe import describe_folder, totals_by_dtype

    found = describe_folder(path)
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
