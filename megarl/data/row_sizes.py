"""How many tokens each row has, found once: in several processes where there are many rows, and kept in the run folder."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from megarl.config.schema import Config, Rows
from megarl.data.sources import Row
from megarl.data.template import load_tokenizer, prompt_template
from megarl.errors import DataError, MegaRLError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Measure = Callable[[Row], tuple[int, ...]]
ShareOut = Callable[[str, Any, Sequence[Any], Callable[[int], None]], list[Any]]

_FEW_ROWS = 8_000  # are measured here: starting processes and tokenizers takes longer
_KEPT_FROM = 1_000  # rows; fewer are measured in a moment
_BATCH = 256  # rows
_FORMAT = 1  # of what is kept
_SILENCE = 3.0  # seconds without a line of progress
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")


class RowSizes:
    """Measures the rows of a run.

    Args:
        config: the run.
        tokenizer: of the policy.
        folder: where sizes are kept; None keeps none.
        share_out: gives the answers of processes to batches, as ``workers.batches.in_processes``; None measures in this process.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: "PreTrainedTokenizerBase",
        folder: Path | None = None,
        share_out: ShareOut | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._folder = folder
        self._share_out = share_out

    def measure(self, name: str, rows: Sequence[Row], form: Rows) -> numpy.ndarray:
        """Return the tokens of each row, int64: prompts [n, 1], examples' prompts and responses [n, 2], pairs' prompts and both
        responses [n, 3].

        Raises:
            DataError: a row cannot be written for the model; it is named.
        """
        path = None
        if self._folder is not None and len(rows) >= _KEPT_FROM:
            path = self._folder / f"{_digest(self._config, rows, form)}.npy"
        if path is not None and (kept := _read(path, len(rows))) is not None:
            return kept
        progress = Progress(name, len(rows))
        if len(rows) < _FEW_ROWS or self._share_out is None:
            measure = measure_of(self._config, self._tokenizer, form)
            sizes = [_measured(measure, row, progress, index) for index, row in enumerate(rows)]
        else:
            sizes = self._shared_out(self._share_out, rows, form, progress)
        progress.finish()
        measured = numpy.array(sizes, dtype=numpy.int64).reshape(len(rows), -1)
        if path is not None:
            _keep(path, measured)
        return measured

    def _shared_out(self, share_out: ShareOut, rows: Sequence[Row], form: Rows, progress: "Progress") -> list[tuple[int, ...]]:
        batches = [
            [(row.row_id, row.location, row.prompt, row.answer, row.rejected) for row in rows[start : start + _BATCH]]
            for start in range(0, len(rows), _BATCH)
        ]
        argument = [self._config.model_dump(mode="json"), form]
        try:
            answers = share_out(
                "megarl.data.row_sizes:build", argument, batches, lambda num_batches: progress.update(num_batches * _BATCH)
            )
        except MegaRLError as error:
            raise DataError(str(error)) from error
        return [sizes for answer in answers for sizes in answer]


def build(argument: Any) -> Callable[[Any], list[tuple[int, ...]]]:
    """Build the function of a process that measures batches of rows; ``argument`` is the config and the form."""
    config, form = Config.model_validate(argument[0]), argument[1]
    measure = measure_of(config, load_tokenizer(config.model.tokenizer or config.model.path), form)

    def measure_batch(batch: Any) -> list[tuple[int, ...]]:
        rows = (
            Row(row_id=row_id, location=location, prompt=prompt, answer=answer, rejected=rejected, task="", reference={})
            for row_id, location, prompt, answer, rejected in batch
        )
        return [naming_row(row, measure, row) for row in rows]

    return measure_batch


def measure_of(config: Config, tokenizer: "PreTrainedTokenizerBase", form: Rows) -> Measure:
    """Return the function that measures a row of this run."""
    template = prompt_template(config, tokenizer)
    suffix, no_limit = config.data.response_suffix, 1 << 62

    def of_example(row: Row) -> tuple[int, ...]:
        example = template.encode_example(row, suffix, no_limit)
        return example.num_prompt_tokens, len(example.token_ids) - example.num_prompt_tokens

    def of_pair(row: Row) -> tuple[int, ...]:
        pair = template.encode_pair(row, suffix, no_limit)
        num_prompt = pair.chosen.num_prompt_tokens
        return num_prompt, len(pair.chosen.token_ids) - num_prompt, len(pair.rejected.token_ids) - num_prompt

    def of_prompt(row: Row) -> tuple[int, ...]:
        return (len(template.encode_prompt(row).token_ids),)

    measures: dict[Rows, Measure] = {"prompts": of_prompt, "examples": of_example, "pairs": of_pair}
    return measures[form]


def naming_row(row: Row, function: Callable[..., object], *arguments: object) -> Any:
    """Call the function and return its answer; whatever it raises is a DataError that names the row by its place."""
    try:
        return function(*arguments)
    except Exception as error:  # tokenizers raise errors of any kind, and name no row
        if isinstance(error, MegaRLError) and (not row.location or str(error).startswith(row.location)):
            raise
        reason = str(error) if isinstance(error, MegaRLError) else f"the tokenizer refuses it ({one_line(error)[:150]}); change it"
        raise DataError(f"{row.location or row.row_id}: {reason}") from error


class Progress:
    """Lines for people while rows are checked, as soon as that takes seconds."""

    def __init__(self, name: str, num_rows: int) -> None:
        self._name = name
        self._num_rows = num_rows
        self._begin = self._last = time.monotonic()

    def update(self, num_done: int) -> None:
        """Show how many rows are checked."""
        now = time.monotonic()
        if now - self._last >= _SILENCE:
            self._last = now
            print(f"{self._name}: {min(num_done, self._num_rows):,} of {self._num_rows:,} rows checked", flush=True)

    def finish(self) -> None:
        """Show that all rows are measured."""
        seconds = time.monotonic() - self._begin
        if seconds >= _SILENCE:
            print(f"{self._name}: {self._num_rows:,} rows checked in {seconds:.0f} seconds", flush=True)


def _measured(measure: Measure, row: Row, progress: Progress, index: int) -> tuple[int, ...]:
    sizes: tuple[int, ...] = naming_row(row, measure, row)
    progress.update(index + 1)
    return sizes


def _digest(config: Config, rows: Sequence[Row], form: Rows) -> str:
    """Digest all that the sizes depend on: the rows' texts, the tokenizer's files, how they are written, and the libraries."""
    digest = hashlib.blake2b(digest_size=16)
    written = config.data.model_dump(mode="json", exclude={"train", "exclude", "sampling", "too_long"})
    libraries = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    digest.update(json.dumps([_FORMAT, form, written, libraries]).encode())
    files = [path for path in sorted((config.model.tokenizer or config.model.path).rglob("*")) if path.suffix in _TOKENIZER_FILES]
    for path in [*files, *([config.data.chat_template] if config.data.chat_template else [])]:
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    for row in rows:
        digest.update(json.dumps([row.prompt, row.answer, row.rejected]).encode())
    return digest.hexdigest()


def _read(path: Path, num_rows: int) -> numpy.ndarray | None:
    try:
        kept: numpy.ndarray = numpy.load(path, allow_pickle=False)
    except (OSError, ValueError):  # not there, or half written: measured again
        return None
    return kept if kept.ndim == 2 and len(kept) == num_rows and kept.dtype == numpy.int64 else None


def _keep(path: Path, sizes: numpy.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        numpy.save(file, sizes)
    unfinished.replace(path)
