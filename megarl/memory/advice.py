"""Which settings bring a run under a memory limit, with the peak that it would have then."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from megarl.config.checks import check
from megarl.config.models import models_of
from megarl.config.schema import Config, RoleConfig, Section
from megarl.errors import ConfigError
from megarl.memory.statement import Device, state_memory

LEAST_GAIN = 0.99  # of the peak; what gains less is not worth a line
SMALLEST_CHUNK = 128  # tokens; smaller chunks of logits are not worth their time


@dataclass(frozen=True, slots=True)
class Change:
    """Settings and the peak with them.

    Attributes:
        settings: as ``--set`` takes them, or ``--world-size=N``.
        peak: bytes of the worst rank.
    """

    settings: tuple[str, ...]
    peak: float


@dataclass(frozen=True, slots=True)
class _Run:
    config: Config
    world_size: int
    device: Device

    def peak(self) -> float:
        """Return the bytes of the worst rank; infinite where the run is refused."""
        try:
            check(self.config, self.world_size)
            return state_memory(self.config, self.world_size, self.device)[0].peak
        except ConfigError:
            return float("inf")


@dataclass(frozen=True, slots=True)
class _Edit:
    setting: str
    apply: Callable[[_Run], _Run]


def changes_that_help(config: Config, world_size: int, device: Device, limit: float) -> tuple[list[Change], Change | None]:
    """Find what to change in the configuration.

    Args:
        config: that passed the cross-checks.
        world_size: ranks of the run.
        device: that they compute on.
        limit: bytes of a rank.

    Returns:
        The single changes that lower the peak by at least 1 %, those that bring it under the limit first, of each kind the
        mildest that does or else the strongest; and, where no single change does, several together that do, if there are.
    """
    run = _Run(config, world_size, device)
    before = run.peak()
    strongest: list[tuple[float, _Edit]] = []
    for kind in _kinds(run):
        tried: list[tuple[float, _Edit]] = []
        for edit in kind:
            tried.append((edit.apply(run).peak(), edit))
            if tried[-1][0] <= limit:
                break
        if tried:
            strongest.append(min(reversed(tried), key=lambda item: item[0]))
    strongest.sort(key=lambda item: item[0])  # those under the limit are first
    singles = [Change((edit.setting,), peak) for peak, edit in strongest if peak < before * LEAST_GAIN]
    if singles and singles[0].peak <= limit:
        return singles, None
    # what gains nothing alone may, once another moment is the worst
    return singles, _together(run, before, [edit for peak, edit in strongest if peak <= before], limit)


def _together(run: _Run, peak: float, edits: list[_Edit], limit: float) -> Change | None:
    """Return the fewest of the edits: the strongest first until the peak is under the limit, and then without those not needed."""
    chosen: list[_Edit] = []
    for edit in edits:
        lower = _with(run, [*chosen, edit]).peak()
        if lower <= peak:
            chosen, peak = [*chosen, edit], lower
        if peak <= limit:
            break
    else:
        return None
    for edit in chosen[:-1]:
        others = [other for other in chosen if other is not edit]
        if (without := _with(run, others).peak()) <= limit:
            chosen, peak = others, without
    return Change(tuple(edit.setting for edit in chosen), peak)


def _with(run: _Run, edits: list[_Edit]) -> _Run:
    for edit in edits:
        run = edit.apply(run)
    return run


def _kinds(run: _Run) -> Iterator[Iterator[_Edit]]:
    """Return edits of one setting each, the mildest first."""
    for name in models_of(run.config):
        role = cast(RoleConfig | None, getattr(run.config, name))
        if role is not None:  # else it has the policy's settings
            yield from _kinds_of_role(run, name, role)
    if run.config.model.dtype == "float32":
        yield _edits("model.dtype", ["bfloat16"])
    if run.config.samples_from_embedded:
        sequences = run.config.rollout.embedded.batch_size
        yield _edits("rollout.embedded.batch_size", [sequences // factor for factor in (2, 4, 8) if sequences >= factor])
    yield (_Edit(f"--world-size={run.world_size * factor}", _ranks(run.world_size * factor)) for factor in (2, 4, 8))


def _kinds_of_role(run: _Run, name: str, role: RoleConfig) -> Iterator[Iterator[_Edit]]:
    parallel = role.parallel
    learns = name in ("policy", "critic")
    if learns:
        stronger = {"none": ["selective", "full"], "selective": ["full"], "full": []}
        yield _edits(f"{name}.recompute", list(stronger[role.recompute]))
        if not role.offload_activations:
            yield _edits(f"{name}.offload_activations", [True])
    yield _edits(f"{name}.max_tokens_per_micro_batch", _halvings(role.max_tokens_per_micro_batch, run.config.step_size.unit_tokens))
    yield _edits(f"{name}.logprob_chunk_tokens", _halvings(role.logprob_chunk_tokens, SMALLEST_CHUNK))
    if learns and not parallel.distributed_optimizer:
        yield _edits(f"{name}.parallel.distributed_optimizer", [True])
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield _edits(f"{name}.parallel.sequence_parallel", [True])
    for axis in ("tp", "cp", "pp", "ep"):
        size = getattr(parallel, axis)
        yield _edits(f"{name}.parallel.{axis}", [size * factor for factor in (2, 4, 8) if size * factor <= run.world_size])


def _halvings(value: int, least: int) -> list[int]:
    smaller = []
    while value // 2 >= least:
        value //= 2
        smaller.append(value)
    if smaller and smaller[-1] > least > SMALLEST_CHUNK:
        smaller.append(least)
    return smaller


def _edits(key: str, values: list[Any]) -> Iterator[_Edit]:
    return (_Edit(f"{key}={str(value).lower()}", _setter(key, value)) for value in values)


def _setter(key: str, value: object) -> Callable[[_Run], _Run]:
    return lambda run: replace(run, config=cast(Config, _changed(run.config, key.split("."), value)))


def _changed(section: Section, path: list[str], value: object) -> Section:
    inner = value if len(path) == 1 else _changed(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})


def _ranks(world_size: int) -> Callable[[_Run], _Run]:
    return lambda run: replace(run, world_size=world_size)
