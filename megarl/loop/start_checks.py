"""Checks of all rows before a run begins: in several processes, with progress, and not again where nothing has changed."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megarl.builtin.scorers import AnswerScorer
from megarl.config.schema import Config
from megarl.config.tasks import EVALUATION, task_scorers, tasks_of
from megarl.data.row_sizes import Progress, RowSizes
from megarl.data.sources import Row, read_rows
from megarl.errors import DataError, MegaRLError
from megarl.rewards import start_checks as reward_checks
from megarl.workers.batches import in_processes

_FEW = 2_000  # different answers are checked here: starting processes takes longer
_KEPT_FROM = 300  # different answers; fewer are checked in a moment
_BATCH = 64  # answers
_FORMAT = 1  # of the checks: a newer one is not satisfied by what an older one found


def checks_folder(config: Config) -> Path:
    """Return where a run keeps what its checks found."""
    return config.run_dir / "checks"


def row_sizes(config: Config, tokenizer: PreTrainedTokenizerBase) -> RowSizes:
    """Return what measures the rows of a run."""
    return RowSizes(config, tokenizer, checks_folder(config), in_processes)


def check_references(config: Config, rows: Iterable[Row]) -> None:
    """Check that every answer of these rows and of ``evaluation.data`` can be compared with responses by its task's scorers.

    Raises:
        DataError: one cannot; it names the row, the answer, and what to do.
    """
    own = task_scorers(config)
    locations: dict[str, str] = {}  # the first of those that are compared with the same
    for row in itertools.chain(rows, _held_out_rows(config)):
        for scorer in own.get(row.task, config.rewards.scorers):
            if not isinstance(scorer, AnswerScorer):
                continue
            compared = json.dumps(reward_checks.compared_with(scorer, row.reference), default=str)
            locations.setdefault(compared, row.location or row.row_id)
    items = list(locations)
    done = checks_folder(config) / f"{_digest(items)}.references"
    if done.exists():
        return
    for item, reason in zip(items, _reasons(items), strict=True):
        if reason is not None:
            raise DataError(f"{locations[item]}: {reason}")
    if len(items) >= _KEPT_FROM:
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


def _held_out_rows(config: Config) -> Iterator[Row]:
    if config.evaluation.data is not None:
        for task in tasks_of(config.evaluation.data, EVALUATION):
            yield from read_rows(task.source, task.name)


def _reasons(items: Sequence[str]) -> list[str | None]:
    progress = Progress("answers of the rows", len(items))
    if len(items) < _FEW:
        reasons = []
        for index, item in enumerate(items):
            reasons.append(reward_checks.why_refused(*json.loads(item)))
            progress.update(index + 1)
    else:
        batches = [[json.loads(item) for item in items[start : start + _BATCH]] for start in range(0, len(items), _BATCH)]
        try:
            answers = in_processes(
                "megarl.rewards.start_checks:build", None, batches, lambda num_batches: progress.update(num_batches * _BATCH)
            )
        except MegaRLError as error:
            raise DataError(str(error)) from error
        reasons = [reason for answer in answers for reason in answer]
    progress.finish()
    return reasons


def _digest(items: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([_FORMAT, *(version(name) for name in ("math-verify", "latex2sympy2-extended", "sympy"))]).encode())
    for item in items:
        digest.update(item.encode() + b"\n")
    return digest.hexdigest()
