"""The commands of ``megarl``."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megarl import __version__
from megarl.cli import plan_memory  # noqa: F401  (adds plan memory)
from megarl.cli.command_line import ConfigPath, Overrides, finite
from megarl.cli.convert import convert_app
from megarl.cli.plan_sync import plan_app
from megarl.config.checks import check
from megarl.config.explain import explain
from megarl.config.load import load_config
from megarl.config.redaction import redacted
from megarl.config.schema import Config
from megarl.config.stages import configs_of
from megarl.config.unused_settings import unused_settings

app = typer.Typer(add_completion=False, no_args_is_help=True)

app.add_typer(plan_app, name="plan")
app.add_typer(convert_app, name="convert")

MOST_LOCAL_RANKS = 1024

NumRanks = Annotated[
    int,
    typer.Option("--nproc", min=1, max=MOST_LOCAL_RANKS, help="Ranks to start on this machine; ignored under torchrun and srun."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"megarl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reinforcement learning for large language models on Megatron-Core."""


def _load(path: Path, overrides: list[str], run_dir: Path | None = None) -> Config:
    return load_config(path, overrides, {} if run_dir is None else {"run_dir": str(run_dir)})


@app.command()
def train(
    config_path: ConfigPath,
    overrides: Overrides = [],  # noqa: B006  (typer's way)
    nproc: NumRanks = 1,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run writes; overrides the file's run_dir.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's newest checkpoint.")] = False,
) -> None:
    """Run the training that CONFIG describes."""
    config = _load(config_path, overrides, run_dir)

    from megarl.loop.launch import launch_training

    launch_training(config, num_ranks=nproc, resume=resume)


@app.command("eval")
def evaluate(
    config_path: ConfigPath,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint folder (checkpoints/step_…) or a Hugging Face folder.")],
    overrides: Overrides = [],  # noqa: B006
    nproc: NumRanks = 1,
) -> None:
    """Print the accuracy of a checkpoint on the held-out prompts of CONFIG."""
    config = _load(config_path, overrides)

    from megarl.loop.launch import launch_evaluation

    metrics = launch_evaluation(config, checkpoint, num_ranks=nproc)
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")


@app.command("config")
def show_config(config_path: ConfigPath, overrides: Overrides = [], nproc: NumRanks = 1) -> None:  # noqa: B006
    """Print CONFIG resolved and explained, after checking it for --nproc ranks."""
    config = _load(config_path, overrides)
    check(config, nproc)
    print(explain(redacted(config)))
    for line in unused_settings(config):
        print(f"# notice: {line}")


@app.command()
def parity(
    config_path: ConfigPath,
    layouts: Annotated[list[str], typer.Option("--layouts", help='Layouts such as "tp=2" "tp=2,critic.pp=2".')],
    more_layouts: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # what follows the first one after --layouts
    overrides: Overrides = [],  # noqa: B006
    bound: Annotated[
        float, typer.Option(help="Largest accepted gap of any parameter's gradient, relative to its norm.", min=0, callback=finite)
    ] = 1e-5,
    num_prompts: Annotated[int, typer.Option(min=1, max=10**6, help="Prompts of the batch.")] = 4,
) -> None:
    """Compare loss, gradients and every model's outputs for one batch (with a curriculum of its last stage) between layouts and one
    rank; exit 1 where they differ."""
    whole = _load(config_path, overrides)
    config = configs_of(whole)[-1]

    from megarl.cli.parity import ParityRun, parse_layout, with_layout
    from megarl.cli.prompts import first_prompts
    from megarl.models.scaled_folder import with_scaled_model

    parsed = {text: parse_layout(text) for text in (*layouts, *(more_layouts or []))}
    for layout in parsed.values():
        check(*with_layout(config, layout))
    table = Table("layout", "ranks", "loss", "loss gap", "norm gap", "worst gradient gap", "parameter", "score gap", "")
    failed = False
    with tempfile.TemporaryDirectory(prefix="megarl-parity-") as folder:
        scaled = with_scaled_model(config, Path(folder), writes=True)
        run = ParityRun(scaled, first_prompts(whole, num_prompts), Path(folder))
        for text, layout in parsed.items():
            row = run.compare_layout(text, layout)
            accepted = max(row.loss_gap, row.norm_gap, row.worst_gap, row.output_gap) <= bound
            failed |= not accepted
            gaps = [f"{gap:.1e}" for gap in (row.loss_gap, row.norm_gap, row.worst_gap)]
            verdict = "ok" if accepted else "ABOVE BOUND"
            cells = (*gaps, row.worst_parameter, f"{row.output_gap:.1e}", verdict)
            table.add_row(text, str(row.num_ranks), f"{row.loss:.6f}", *cells)
    Console(width=160).print(table)
    if failed:
        raise typer.Exit(1)
