"""Rows from JSON-lines files, Hugging Face datasets and reasoning-gym tasks."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.schema import DatasetsSource, JsonlSource, ReasoningGymSource, RowSource
from megarl.errors import DataError

ChatMessage = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One task as its source has it, before any template.

    Attributes:
        row_id: its task and the row's index in its source, e.g. ``"train/17"``.
        prompt: the question, or a chat of ``{"role": ..., "content": ...}`` messages.
        answer: the expected answer; SFT trains on it, and training on preferences towards it.
        rejected: for training on preferences, the response that the answer is preferred to; None otherwise.
        task: the caller's name of its source.
        reference: what scorers compare with. ``"answer"`` is always there. jsonl and datasets rows carry all their fields,
            reasoning_gym rows ``"task"``, ``"options"`` and ``"entry"``.
    """

    row_id: str
    prompt: str | list[ChatMessage]
    answer: str
    rejected: str | None
    task: str
    reference: Mapping[str, Any]

    @property
    def prompt_text(self) -> str:
        """The prompt without any template; rows with equal texts ask the same."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


def read_rows(source: RowSource, task: str, *, in_pairs: bool = False) -> Sequence[Row]:
    """All rows of a source, with ids ``task/0``, ``task/1`` ...; rows of datasets and reasoning_gym are made on access.

    Args:
        source: where they are.
        task: name for their ids.
        in_pairs: rows of jsonl and datasets have a chosen and a rejected response in place of an answer.

    Raises:
        DataError: the source is missing or empty, or a row is malformed (for lazily made rows: when the row is accessed).
    """
    if isinstance(source, JsonlSource):
        return _read_jsonl(source, task, in_pairs=in_pairs)
    if isinstance(source, DatasetsSource):
        return _DatasetRows(source, task, in_pairs=in_pairs)
    return _ReasoningGymRows(source, task)


def number_at(row: Row, field: str, option: str) -> float:
    """The number in a field of the row's reference.

    Args:
        row: any row.
        field: its name, dotted for nested fields (``entry.metadata.difficulty.num_terms``).
        option: the key that names the field, for the error.

    Raises:
        DataError: there is no such field, or no finite number in it.
    """
    value: Any = row.reference
    for depth, name in enumerate(names := field.split(".")):
        if not isinstance(value, Mapping) or name not in value:
            has = f"it has: {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"there is a {type(value).__name__}"
            place = f" in {'.'.join(names[:depth])}" if depth else ""
            raise DataError(f"row {row.row_id} has no field '{name}'{place} ({has}); add it or set {option}")
        value = value[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"row {row.row_id}: field '{field}' is {value!r}; {option} needs a finite number in every row")
    return float(value)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place, ``file:line``.

    Raises:
        DataError: the file cannot be read or has none, or a line is not a JSON object.
    """
    is_empty = True
    try:
        # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    is_empty = False
                    place = f"{path}:{number}"
                    yield place, _parse_object(line, place)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give the path of a JSON-lines file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    if is_empty:
        raise DataError(f"{path} has no rows; write one JSON object a line")


def _read_jsonl(source: JsonlSource, task: str, *, in_pairs: bool) -> list[Row]:
    objects = enumerate(read_objects(source.path))
    make = _pair_row if in_pairs else _row
    return [make(fields, source, task, index, place) for index, (place, fields) in objects]


def _parse_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}); write one JSON object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a {type(value).__name__}, not a JSON object; write one object a line")
    return value


def _row(fields: Mapping[str, Any], source: JsonlSource | DatasetsSource, task: str, index: int, place: str) -> Row:
    _check_fields(fields, {"prompt_field": source.prompt_field, "answer_field": source.answer_field}, place)
    prompt, answer = fields[source.prompt_field], fields[source.answer_field]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise DataError(f"{place}: field '{source.answer_field}' is a {type(answer).__name__}; it must be a string or a number")
    _check_prompt(prompt, f"{place}: field '{source.prompt_field}'")
    return Row(
        row_id=f"{task}/{index}", prompt=prompt, answer=answer, rejected=None, task=task, reference={**fields, "answer": answer}
    )


def _pair_row(fields: Mapping[str, Any], source: JsonlSource | DatasetsSource, task: str, index: int, place: str) -> Row:
    responses = {"chosen_field": source.chosen_field, "rejected_field": source.rejected_field}
    _check_fields(fields, {"prompt_field": source.prompt_field} | responses, place)
    _check_prompt(fields[source.prompt_field], f"{place}: field '{source.prompt_field}'")
    for name in responses.values():
        if not isinstance(fields[name], str):
            raise DataError(f"{place}: field '{name}' is a {type(fields[name]).__name__}; it must be a string")
        if not fields[name].strip():
            raise DataError(f"{place}: field '{name}' is an empty string; write a response or leave the row out")
    chosen, rejected = (fields[name] for name in responses.values())
    if chosen == rejected:
        raise DataError(
            f"{place}: fields '{source.chosen_field}' and '{source.rejected_field}' are equal, so neither is preferred; leave the "
            "row out"
        )
    return Row(
        row_id=f"{task}/{index}",
        prompt=fields[source.prompt_field],
        answer=chosen,
        rejected=rejected,
        task=task,
        reference={**fields, "answer": chosen},
    )


def _check_fields(fields: Mapping[str, Any], names: Mapping[str, str], place: str) -> None:
    """All names are there; ``names`` is by the option that gives the name."""
    for option, name in names.items():
        if name not in fields:
            raise DataError(f"{place}: no field '{name}' (it has: {', '.join(fields)}); add it or set {option}")


def _check_prompt(prompt: Any, place: str) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{place} is an empty string; write a prompt or leave the row out")
        return
    if not isinstance(prompt, list):
        raise DataError(f"{place} is a {type(prompt).__name__}; it must be a string or a list of chat messages")
    if not prompt:
        raise DataError(f"{place} is an empty list; write a prompt or leave the row out")
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise DataError(f"{place}: message {index} must be an object with the strings 'role' and 'content'")


class _LazyRows(Sequence[Row]):
    """A sequence whose rows are made when asked for, so that a large source stays on disk."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._num_rows)[index]]
        return self._make(range(self._num_rows)[index])

    def __iter__(self) -> Iterator[Row]:
        return (self._make(index) for index in range(self._num_rows))

    def _make(self, index: int) -> Row:
        raise NotImplementedError


class _DatasetRows(_LazyRows):
    """Rows of a Hugging Face dataset, memory-mapped."""

    def __init__(self, source: DatasetsSource, task: str, *, in_pairs: bool) -> None:
        self._source, self._task = source, task
        self._make_row = _pair_row if in_pairs else _row
        self._dataset = load_dataset(source)
        super().__init__(len(self._dataset))
        if not self._num_rows:
            raise DataError(f"dataset {source.path} split '{source.split}' has no rows; choose another split")

    def _make(self, index: int) -> Row:
        place = f"dataset {self._source.path} split '{self._source.split}' row {index}"
        return self._make_row(self._dataset[index], self._source, self._task, index, place)


def load_dataset(source: DatasetsSource) -> Any:
    """The split as a datasets.Dataset; DataError when there is none."""
    import datasets  # here, because it takes seconds and other sources do without

    is_saved = any((Path(source.path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(source.path) if is_saved else datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        raise DataError(
            f"cannot load dataset {source.path} split '{source.split}': {_one_line(error)}; check path and split"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise DataError(
                f"dataset {source.path} has no split '{source.split}' (it has: {', '.join(loaded)}); set split to one of them"
            )
        return loaded[source.split]
    return loaded


class _ReasoningGymRows(_LazyRows):
    """Tasks of a reasoning-gym generator; entry ``i`` depends only on the options, the seed and ``i``."""

    def __init__(self, source: ReasoningGymSource, task: str) -> None:
        self._source, self._task = source, task
        self._dataset = _create_tasks(source)
        super().__init__(source.size)

    def _make(self, index: int) -> Row:
        entry = self._dataset[index]
        # Some generators give a number or nothing as the answer; their score_answer reads the entry, not this text.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        reference = {"answer": answer, "task": self._source.task, "options": self._source.options, "entry": entry}
        return Row(
            row_id=f"{self._task}/{index}",
            prompt=entry["question"],
            answer=answer,
            rejected=None,
            task=self._task,
            reference=reference,
        )


def _create_tasks(source: ReasoningGymSource) -> Any:
    import reasoning_gym  # here, because it takes seconds and other sources do without
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        nearest = difflib.get_close_matches(source.task, DATASETS, n=1, cutoff=0)[0]
        raise DataError(f"reasoning_gym has no task '{source.task}'; the nearest is '{nearest}'")
    try:
        return reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.options)
    except Exception as error:
        raise DataError(f"reasoning_gym task '{source.task}' refuses options {source.options}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
