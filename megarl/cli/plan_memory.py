"""``megarl plan memory``: the peak memory of every rank, stated before a run starts."""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from megarl.cli.command_line import ConfigPath, Overrides, finite
from megarl.cli.plan_sync import fewest_ranks, plan_app
from megarl.config.checks import check
from megarl.config.layout_text import MOST_RANKS
from megarl.config.load import load_config
from megarl.config.models import models_of
from megarl.config.schema import Config
from megarl.config.stages import Stage, configs_of, stages_of
from megarl.errors import ConfigError

if TYPE_CHECKING:
    from megarl.memory.advice import Change
    from megarl.memory.statement import MemoryPart, RankMemory

GIB = 2**30
LARGEST_PARTS = 3  # named when the limit is passed


@dataclass(frozen=True, slots=True)
class Period:
    """A stage of the run, the run if it has no stages, or the move of its learners from one stage's layout to the next.

    Attributes:
        name: of the stage or the two stages; None for a run without.
        kinds: its kinds of ranks, the worst first.
        changes, together: what brings it under the limit (see ``changes_that_help``); none of a move.
    """

    name: str | None
    is_move: bool
    kinds: list["RankMemory"]
    changes: list["Change"]
    together: "Change | None"

    @property
    def peak(self) -> float:
        """Bytes of its worst rank."""
        return self.kinds[0].peak


@plan_app.command()
def memory(
    config_path: ConfigPath,
    overrides: Overrides = [],  # noqa: B006
    world_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_RANKS, help="Ranks of the run; needed unless every layout fits on one.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="What the ranks will compute on; cuda where this machine has it.")
    ] = None,
    limit_gib: Annotated[
        float | None, typer.Option(min=0.001, max=1e12, callback=finite, help="GiB of a rank; exit 1 where a rank needs more.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes.")] = False,
) -> None:
    """Print the peak memory of CONFIG's ranks, in every stage of its curriculum, and, where it is above --limit-gib, what to
    change."""
    import torch

    config = load_config(config_path, overrides)
    ranks = world_size or _only_rank(config)
    check(config, ranks)
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    limit = None if limit_gib is None else limit_gib * GIB
    periods = _periods(config, ranks, on, limit)
    worst = max(periods, key=lambda period: period.peak)
    above = [] if limit is None else [period for period in periods if period.peak > limit]
    if as_json:
        print(json.dumps(_as_json(periods, worst, (ranks, on), limit)))
    else:
        if len(periods) > 1:
            _show_periods(periods)
        _show(worst, f"{ranks} ranks on {on}")
        for period in above:
            assert limit is not None
            _show_advice(period, limit)
    if above:
        raise typer.Exit(1)


def _periods(config: Config, ranks: int, on: Literal["cpu", "cuda"], limit: float | None) -> list[Period]:
    """Return the stages in their order, each but the first after the move to it."""
    from megarl.memory.statement import state_memory, state_relayout

    if config.curriculum is None:
        return [_advised(None, config, state_memory(config, ranks, on), (ranks, on), limit)]
    periods: list[Period] = []
    stages = stages_of(config)
    for number, stage in enumerate(stages):
        if number:
            before = stages[number - 1]
            move = state_relayout(before.config, stage.config, ranks, on)
            periods.append(Period(f"{before.name} → {stage.name}", True, move, [], None))
        periods.append(_advised(stage, stage.config, state_memory(stage.config, ranks, on), (ranks, on), limit))
    return periods


def _advised(
    stage: Stage | None, config: Config, kinds: list["RankMemory"], where: tuple[int, Literal["cpu", "cuda"]], limit: float | None
) -> Period:
    from megarl.memory.advice import changes_that_help

    name = None if stage is None else stage.name
    if limit is None or kinds[0].peak <= limit:
        return Period(name, False, kinds, [], None)
    changes, together = changes_that_help(config, *where, limit)
    changes = [_in_stage(change, stage) for change in changes]
    return Period(name, False, kinds, changes, None if together is None else _in_stage(together, stage))


def _in_stage(change: "Change", stage: Stage | None) -> "Change":
    """Return the change of this stage alone, but for what all stages have in common."""
    if stage is None:
        return change
    shared = ("--world-size", "model.", "policy.parallel.distributed_optimizer", "critic.parallel.distributed_optimizer")
    settings = (text if text.startswith(shared) else f"{stage.path}.changes.{text}" for text in change.settings)
    return replace(change, settings=tuple(settings))


def _only_rank(config: Config) -> int:
    for stage in configs_of(config):
        for name, model in models_of(stage).items():
            if (fewest := model.role.first_rank + (model.role.num_ranks or fewest_ranks(model.role.parallel))) > 1:
                raise ConfigError(
                    f"plan memory: --world-size is not given, and {name}.parallel needs a multiple of {fewest} ranks; give the "
                    f"ranks of the run, for example --world-size {fewest}: data parallel ranks share out optimizer state"
                )
    return 1


def _show_periods(periods: list[Period]) -> None:
    table = Table("stage", "peak GiB", "on rank", "at")
    for period in periods:
        table.add_row(period.name, _gib(period.peak), str(period.kinds[0].first_rank), period.kinds[0].moment)
    Console(width=132).print(table)


def _show(period: Period, where: str) -> None:
    kinds, worst = period.kinds, period.kinds[0]
    stage = "" if period.name is None else f"{'between' if period.is_move else 'in'} {period.name}, "
    print(f"peak of {where}: {worst.peak / GIB:.3f} GiB, {stage}on rank {worst.first_rank}, at {worst.moment}")
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


def _show_advice(period: Period, limit: float) -> None:
    worst = period.kinds[0]
    who = "" if period.name is None else f"{period.name} is "
    print(f"{who}above the limit of {limit / GIB:g} GiB by {_gib(worst.peak - limit)} GiB; the largest parts are")
    for part in _largest(worst):
        print(f"  {part.owner} {part.name}: {_gib(part.num_bytes)} GiB")
    if period.is_move:
        print("both layouts are there at the same time; use more tp, pp or ranks in one of the two stages")
        return
    for change in period.changes:
        verdict = "under the limit" if change.peak <= limit else "still above"
        print(f"with {change.settings[0]}: {_gib(change.peak)} GiB, {verdict}")
    if period.together is not None:
        print(f"with {' and '.join(period.together.settings)}: {_gib(period.together.peak)} GiB, under the limit")
    elif not any(change.peak <= limit for change in period.changes):
        print("no combination of these is under the limit; use a smaller model or GPUs with more memory")


def _largest(worst: "RankMemory") -> list["MemoryPart"]:
    return sorted((*worst.held, *worst.added), key=lambda part: -part.num_bytes)[:LARGEST_PARTS]


def _as_json(periods: list[Period], worst: Period, where: tuple[int, str], limit: float | None) -> dict[str, Any]:
    return {
        "world_size": where[0],
        "device": where[1],
        "peak_bytes": worst.peak,
        "worst_stage": worst.name,
        "limit_bytes": limit,
        "stages": [_period_as_json(period) for period in periods],
    }


def _period_as_json(period: Period) -> dict[str, Any]:
    def parts(of: tuple["MemoryPart", ...]) -> list[dict[str, Any]]:
        return [{"owner": part.owner, "name": part.name, "bytes": part.num_bytes, "tensors": dict(part.tensors)} for part in of]

    together = period.together
    return {
        "name": period.name,
        "is_move": period.is_move,
        "peak_bytes": period.peak,
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
            for kind in period.kinds
        ],
        "changes": [{"settings": change.settings, "peak_bytes": change.peak} for change in period.changes],
        "changes_together": None if together is None else {"settings": together.settings, "peak_bytes": together.peak},
    }
