"""Where a run writes what it sees: metrics.jsonl, TensorBoard files and readable rollouts."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megarl.errors import CheckpointError, writes
from megarl.types import NO_VERSION, RolloutGroup, ScoredRollout

LOGS = ("metrics.jsonl", "groups.jsonl")


class MetricsWriter:
    """Writes one line of ``metrics.jsonl`` for each call, and TensorBoard scalars.

    A line is ``{"step": 3, "time": <Unix seconds>, "metrics": {...}, "seconds": {<phase>: ...}}``; NaN and infinity are null.

    Args:
        run_dir: the run folder, which exists.
        tensorboard: also write ``tensorboard/``.
        resume_step: go on after this step and forget what was written of later ones; None begins a new file.

    Raises:
        CheckpointError: the file to resume is malformed.
        FileError: it cannot be written, or a new run would write over an old one.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int | None = None) -> None:
        self._file = _LogFile(run_dir / "metrics.jsonl", resume_step)
        self._tensorboard: Any = None
        self._tensorboard_folder = run_dir / "tensorboard"
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by every run

            purge_step = None if resume_step is None else resume_step + 1
            with writes(self._tensorboard_folder):
                self._tensorboard = SummaryWriter(str(self._tensorboard_folder), purge_step=purge_step, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float] | None = None) -> None:
        """Record what was seen at ``step``: metrics by name, and seconds by phase."""
        seconds = seconds or {}
        line = {"step": step, "time": time.time(), "metrics": _finite(metrics), "seconds": _finite(seconds)}
        self._file.write(line)
        if self._tensorboard is not None:
            with writes(self._tensorboard_folder):
                for name, value in {**metrics, **{f"seconds/{phase}": value for phase, value in seconds.items()}}.items():
                    if math.isfinite(value):
                        self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._tensorboard is not None:
            with writes(self._tensorboard_folder):
                self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def first_value(path: Path, name: str, last_step: int) -> float | None:
    """Return the metric in the first line of metrics.jsonl that has it; None where none up to a step has.

    Raises:
        CheckpointError: a line is not one of this log.
    """
    metrics = (json.loads(line).get("metrics", {}) for line in read_log(path, last_step))
    return next((values[name] for values in metrics if values.get(name) is not None), None)


def read_log(path: Path, last_step: int) -> list[bytes]:
    """Read the lines of a log up to a step, without a last line that a kill cut short.

    Raises:
        CheckpointError: another line is not one of this log.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise TypeError(step)
        except (ValueError, LookupError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise CheckpointError(f"{path}:{number}: is not a line of this log; repair or remove the file to resume") from None
        if step <= last_step:
            kept.append(line)
    return kept


class _LogFile:
    """A file of JSON lines, one for each step; see ``MetricsWriter`` for ``resume_step``."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        if resume_step is not None:
            kept = read_log(path, resume_step)
            temporary = path.with_suffix(".jsonl.tmp")
            with writes(temporary):
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
                os.replace(temporary, path)
        with writes(path):
            # Line-buffered: a killed run loses no finished line.
            self._file = path.open("x" if resume_step is None else "a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, object]) -> None:
        with writes(self._path):
            self._file.write(json.dumps(values, allow_nan=False) + "\n")

    def close(self) -> None:
        with writes(self._path):
            self._file.close()


class TicketsWriter:
    """Writes which groups each step used up: a line of ``groups.jsonl`` for each step.

    A line is ``{"step": 3, "trained": [[<ticket>, <prompt id>], ...], "dropped": [...]}``. A ticket is the running number of a
    group that was begun: those of all lines and of the newest checkpoint's outstanding groups are 0, 1, 2 ..., each once.

    Args:
        run_dir: the run folder, which exists.
        resume_step: as MetricsWriter's.

    Raises:
        CheckpointError: the file to resume is malformed.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        self._file = _LogFile(run_dir / "groups.jsonl", resume_step)

    def write(self, step: int, trained: Sequence[tuple[int, str]], dropped: Sequence[tuple[int, str]]) -> None:
        """Record the groups that ``step`` trained on, and those given up since the step before, by ticket and prompt id."""
        self._file.write({"step": step, "trained": trained, "dropped": dropped})

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


class RolloutWriter:
    """Writes some responses of each step as readable JSON lines, ``rollouts/step_000012.jsonl``.

    Args:
        run_dir: the run folder, which exists.
        per_step: responses written for each step; 0 writes no file.
    """

    def __init__(self, run_dir: Path, per_step: int) -> None:
        self._folder = run_dir / "rollouts"
        self._per_step = per_step
        if per_step > 0:
            with writes(self._folder):
                self._folder.mkdir(exist_ok=True)

    def write(self, step: int, groups: Sequence[RolloutGroup], kind: str = "step") -> None:
        """Write the first responses: one of each group in turn, then the second of each, and so on.

        Args:
            step: the step that sampled them.
            groups: all groups of the step.
            kind: start of the file's name.
        """
        if self._per_step == 0:
            return
        lines = [
            json.dumps(_readable(scored), ensure_ascii=False, allow_nan=False) + "\n"
            for scored in islice(_in_turn(groups), self._per_step)
        ]
        path = self._folder / f"{kind}_{step:06d}.jsonl"
        with writes(path):
            path.write_text("".join(lines), encoding="utf-8")


def _in_turn(groups: Sequence[RolloutGroup]) -> Iterator[ScoredRollout]:
    """Yield all responses, the first of each group, then the second of each ..."""
    for same_index in zip_longest(*(group.rollouts for group in groups)):
        yield from (scored for scored in same_index if scored is not None)


def _readable(scored: ScoredRollout) -> dict[str, object]:
    rollout = scored.rollout
    readable = {
        "prompt_id": rollout.prompt.prompt_id,
        "sample_index": rollout.sample_index,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "reward": _finite_or_none(scored.reward),
        "parts": _finite(scored.parts),
        "finish_reason": rollout.finish_reason.value,
        "prompt_tokens": len(rollout.prompt.token_ids),
        "response_tokens": rollout.num_policy_tokens,
        "weight_versions": sorted({version for version in rollout.weight_versions if version != NO_VERSION}),
        "failures": list(scored.failures),
    }
    if rollout.episode is not None:
        readable["environment_tokens"] = len(rollout.token_ids) - rollout.num_policy_tokens
        readable["turns"] = [{turn.speaker: turn.text} for turn in rollout.episode.turns]
    return readable


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite_or_none(value) for name, value in values.items()}


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None
