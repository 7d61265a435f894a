"""``megarl plan memory``: the peak memory of every rank, stated before a run starts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from megarl.config.checks import check
from megarl.config.load import load_config
from megarl.config.schema import Config
from megarl.errors import ConfigError
from megarl.loop.plan_command import fewest_ranks, plan_app

if TYPE_CHECKING:
    from megarl.memory.advice import Change
    from megarl.memory.statement import Part, RankMemory

GIB = 2**30
LARGEST_PARTS = 3  # named when the limit is passed


@plan_app.command()
def memory(
    config_path: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")],
    overrides: Annotated[list[str], typer.Option("--set", help="section.key=value, overrides the file; may be repeated.")] = [],  # noqa: B006
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks of the run; needed unless every layout fits on one.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="What the ranks will compute on; cuda where this machine has it.")
    ] = None,
    limit_gib: Annotated[float | None, typer.Option(min=0.001, help="GiB of a rank; exit 1 where a rank needs more.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes.")] = False,
) -> None:
    """Print the peak memory of CONFIG's ranks by part and, where it is above --limit-gib, what to change."""
    import torch

    from megarl.memory.advice import changes_that_help
    from megarl.memory.statement import state_memory

    config = load_config(config_path, overrides)
    ranks = world_size or _only_rank(config)
    check(config, ranks)
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kinds = state_memory(config, ranks, on)
    limit = None if limit_gib is None else limit_gib * GIB
    is_above = limit is not None and kinds[0].peak > limit
    changes, together = changes_that_help(config, ranks, on, limit) if is_above and limit is not None else ([], None)
    if as_json:
        print(json.dumps(_as_json(kinds, (ranks, on), limit, changes, together)))
    else:
        _show(kinds, f"{ranks} ranks on {on}")
        if is_above and limit is not None:
            _show_advice(kinds[0], limit, changes, together)
    if is_above:
        raise typer.Exit(1)


def _only_rank(config: Config) -> int:
    from megarl.memory.statement import settings_of_roles

    for name, role in settings_of_roles(config).items():
        if (fewest := role.first_rank + (role.num_ranks or fewest_ranks(role.parallel))) > 1:
            raise ConfigError(
                f"plan memory: --world-size is not given, and {name}.parallel needs a multiple of {fewest} ranks; give the "
                f"ranks of the run, for example --world-size {fewest}: data parallel ranks share out optimizer state"
            )
    return 1


def _show(kinds: list["RankMemory"], where: str) -> None:
    worst = kinds[0]
    print(f"peak of {where}: {worst.peak / GIB:.3f} GiB, on rank {worst.first_rank}, at {worst.moment}")
    table = Table("GiB", *(_title(kind) for kind in kinds))
    names = dict.fromkeys((part.owner, part.name) for kind in kinds for part in (*kind.held, *kind.added))
    for owner, name in names:
        table.add_row(f"{owner} {name}", *(_gib(_size(kind, owner, name)) for kind in kinds))
    table.add_section()
    table.add_row("peak", *(_gib(kind.peak) for kind in kinds))
    table.add_row("at", *(kind.moment for kind in kinds))
    Console(width=132).print(table)
    tensors = [(name, size) for part in worst.added for name, size in part.tensors.items()]
    if tensors:
        print("activations of the worst rank:")
        for name, size in sorted(tensors, key=lambda item: -item[1]):
            print(f"  {name}: {_gib(size)} GiB")
    others = ", ".join(f"{moment} {_gib(size)}" for moment, size in worst.moments.items())
    print(f"its moments: {others} GiB")


def _title(kind: "RankMemory") -> str:
    stages = sorted(set(kind.stages.values()))
    stage = f"stage {stages[0]}" if len(stages) == 1 else ", ".join(f"{name} stage {at}" for name, at in kind.stages.items())
    return f"rank {kind.first_rank}" + (f" and {kind.num_ranks - 1} more" if kind.num_ranks > 1 else "") + f" ({stage})"


def _size(kind: "RankMemory", owner: str, name: str) -> float:
    return sum(part.num_bytes for part in (*kind.held, *kind.added) if (part.owner, part.name) == (owner, name))


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}" if size else "–"


def _show_advice(worst: "RankMemory", limit: float, changes: list["Change"], together: "Change | None") -> None:
    print(f"above the limit of {limit / GIB:g} GiB by {_gib(worst.peak - limit)} GiB; the largest parts are")
    for part in _largest(worst):
        print(f"  {part.owner} {part.name}: {_gib(part.num_bytes)} GiB")
    for change in changes:
        verdict = "under the limit" if change.peak <= limit else "still above"
        print(f"with {change.settings[0]}: {_gib(change.peak)} GiB, {verdict}")
    if together is not None:
        print(f"with {' and '.join(together.settings)}: {_gib(together.peak)} GiB, under the limit")
    elif not any(change.peak <= limit for change in changes):
        print("no combination of these is under the limit; use a smaller model or GPUs with more memory")


def _largest(worst: "RankMemory") -> list["Part"]:
    return sorted((*worst.held, *worst.added), key=lambda part: -part.num_bytes)[:LARGEST_PARTS]


def _as_json(
    kinds: list["RankMemory"], where: tuple[int, str], limit: float | None, changes: list["Change"], together: "Change | None"
) -> dict[str, Any]:
    def parts(of: tuple["Part", ...]) -> list[dict[str, Any]]:
        return [{"owner": part.owner, "name": part.name, "bytes": part.num_bytes, "tensors": dict(part.tensors)} for part in of]

    return {
        "world_size": where[0],
        "device": where[1],
        "peak_bytes": kinds[0].peak,
        "limit_bytes": limit,
        "ranks": [
            {
                "first_rank": kind.first_rank,
                "num_ranks": kind.num_ranks,
                "stages": kind.stages,
                "peak_bytes": kind.peak,
                "moment": kind.moment,
                "held": parts(kind.held),
                "added": parts(kind.added),
                "moments": kind.moments,
            }
            for kind in kinds
        ],
        "changes": [{"settings": change.settings, "peak_bytes": change.peak} for change in changes],
        "changes_together": None if together is None else {"settings": together.settings, "peak_bytes": together.peak},
    }
