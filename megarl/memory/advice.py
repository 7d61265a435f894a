"""Which settings bring a run under a memory limit, with the peak that it would have then."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from megarl.config.checks import check
from megarl.config.schema import Config, RoleConfig
from megarl.errors import ConfigError
from megarl.memory.statement import Device, longest_sequence, roles_of, state_memory

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
        """Bytes of the worst rank; infinite where the run is refused."""
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
    """What to change.

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
    helpful: list[tuple[float, _Edit]] = []
    for kind in _kinds(run):
        best: tuple[float, _Edit] | None = None
        for edit in kind:
            peak = edit.apply(run).peak()
            if peak < (best[0] if best else before * 0.99):
                best = (peak, edit)
            if peak <= limit:
                break
        if best is not None:
            helpful.append(best)
    helpful.sort(key=lambda item: (item[0] > limit, item[0]))
    singles = [Change((edit.setting,), peak) for peak, edit in helpful]
    if helpful and helpful[0][0] <= limit:
        return singles, None
    return singles, _together(run, before, [edit for _, edit in helpful], limit)


def _together(run: _Run, peak: float, edits: list[_Edit], limit: float) -> Change | None:
    """The fewest of the edits: the strongest first until the peak is under the limit, and then without those not needed."""
    chosen: list[_Edit] = []
    for edit in edits:
        lower = _with(run, [*chosen, edit]).peak()
        if lower < peak:
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
    """Edits of one setting each, the mildest first."""
    for name in roles_of(run.config):
        role = cast(RoleConfig | None, getattr(run.config, name))
        if role is not None:  # else it has the policy's settings
            yield from _kinds_of_role(run, name, role)
    if run.config.model.dtype == "float32":
        yield iter([_Edit("model.dtype=bfloat16", _set_dtype)])
    yield (_Edit(f"--world-size={run.world_size * factor}", _ranks(run.world_size * factor)) for factor in (2, 4, 8))


def _kinds_of_role(run: _Run, name: str, role: RoleConfig) -> Iterator[Iterator[_Edit]]:
    def edits(key: str, values: list[Any]) -> Iterator[_Edit]:
        return (_Edit(f"{name}.{key}={str(value).lower()}", _setter(name, key, value)) for value in values)

    parallel = role.parallel
    learns = name in ("policy", "critic")
    if learns:
        stronger = {"none": ["selective", "full"], "selective": ["full"], "full": []}
        yield edits("recompute", list(stronger[role.recompute]))
    yield edits("max_tokens_per_micro_batch", _halvings(role.max_tokens_per_micro_batch, longest_sequence(run.config)))
    yield edits("logprob_chunk_tokens", _halvings(role.logprob_chunk_tokens, SMALLEST_CHUNK))
    if learns and not parallel.distributed_optimizer:
        yield edits("parallel.distributed_optimizer", [True])
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield edits("parallel.sequence_parallel", [True])
    for axis in ("tp", "cp", "pp", "ep"):
        size = getattr(parallel, axis)
        yield edits(f"parallel.{axis}", [size * factor for factor in (2, 4, 8) if size * factor <= run.world_size])


def _halvings(value: int, least: int) -> list[int]:
    smaller = []
    while value // 2 >= least:
        value //= 2
        smaller.append(value)
    if smaller and smaller[-1] > least > SMALLEST_CHUNK:
        smaller.append(least)
    return smaller


def _setter(name: str, key: str, value: Any) -> Callable[[_Run], _Run]:
    def apply(run: _Run) -> _Run:
        role = getattr(run.config, name)
        if key.startswith("parallel."):
            parallel = role.parallel.model_copy(update={key.removeprefix("parallel."): value})
            role = role.model_copy(update={"parallel": parallel})
        else:
            role = role.model_copy(update={key: value})
        return replace(run, config=run.config.model_copy(update={name: role}))

    return apply


def _set_dtype(run: _Run) -> _Run:
    model = run.config.model.model_copy(update={"dtype": "bfloat16"})
    return replace(run, config=run.config.model_copy(update={"model": model}))


def _ranks(world_size: int) -> Callable[[_Run], _Run]:
    return lambda run: replace(run, world_size=world_size)
