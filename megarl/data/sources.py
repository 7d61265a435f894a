"""Rows from files, Hugging Face datasets and reasoning-gym tasks."""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.schema import DatasetsSource, JsonlSource, ReasoningGymSource, RowSource
from megarl.data.row_fields import ChatMessage, checked_prompt, given_text, response_and_context, value_at
from megarl.data.row_files import read_objects
from megarl.errors import DataError, one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One task as its source has it, before any template.

    Attributes:
        row_id: its task and the row's index in its source, e.g. ``"train/17"``.
        location: where a person finds it, e.g. ``data/train.jsonl:18``.
        prompt: the question, or a chat of ``{"role": ..., "content": ...}`` messages.
        answer: the expected answer; SFT trains on it, and training on preferences towards it.
        rejected: for training on preferences, the response that the answer is preferred to; None otherwise.
        task: the caller's name of its source.
        reference: what scorers compare with. ``"answer"`` is always there. jsonl and datasets rows carry all their fields,
            reasoning_gym rows ``"task"``, ``"options"`` and ``"entry"``.
    """

    row_id: str
    location: str = ""
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
        return "\n".join(f"{message['role']}: {message['content'] or ''}" for message in self.prompt)


def read_rows(source: RowSource, task: str, *, in_pairs: bool = False) -> Sequence[Row]:
    """Read all rows of a source, with ids ``task/0``, ``task/1`` ...; rows of datasets and reasoning_gym are made on access.

    Args:
        source: where they are.
        task: name for their ids.
        in_pairs: rows of jsonl and datasets have a chosen and a rejected response in place of an answer.

    Raises:
        DataError: the source is missing or empty, or a row is malformed (for lazily made rows: when the row is accessed).
    """
    if isinstance(source, JsonlSource) or (isinstance(source, DatasetsSource) and _is_file_of_rows(source.path)):
        return _read_file(source, task, in_pairs=in_pairs)
    if isinstance(source, DatasetsSource):
        return _DatasetRows(source, task, in_pairs=in_pairs)
    return _ReasoningGymRows(source, task)


def number_at(row: Row, field: str, option: str) -> float:
    """Return the number in a field of the row's reference.

    Args:
        row: any row.
        field: its name, dotted for nested fields (``entry.metadata.difficulty.num_terms``).
        option: the key that names the field, for the error.

    Raises:
        DataError: there is no such field, or no finite number in it.
    """
    value: object = row.reference
    for depth, name in enumerate(names := field.split(".")):
        if not isinstance(value, Mapping) or name not in value:
            has = f"it has: {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"there is a {type(value).__name__}"
            location = f" in {'.'.join(names[:depth])}" if depth else ""
            raise DataError(f"row {row.row_id} has no field '{name}'{location} ({has}); add it or set {option}")
        value = value[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"row {row.row_id}: field '{field}' is {value!r}; {option} needs a finite number in every row")
    return float(value)


def _is_file_of_rows(path: str) -> bool:
    return Path(path).is_file() and Path(path).suffix != ".arrow"


def _read_file(source: JsonlSource | DatasetsSource, task: str, *, in_pairs: bool) -> list[Row]:
    objects = enumerate(read_objects(Path(source.path)))
    make = _pair_row if in_pairs else _row
    return [make(fields, source, task, index, location) for index, (location, fields) in objects]


def _row(fields: Mapping[str, object], source: JsonlSource | DatasetsSource, task: str, index: int, location: str) -> Row:
    prompt = value_at(fields, source.prompt_field, "prompt_field", location)
    if source.answer_field == source.prompt_field:
        where = f"{location}: field '{source.prompt_field}'"
        answer, prompt = response_and_context(prompt, where)
        if prompt is None:
            raise DataError(
                f"{where} is prompt_field and answer_field, and no chat, whose last message would be the answer; name two"
            )
    else:
        answer = given_text(
            value_at(fields, source.answer_field, "answer_field", location), f"{location}: field '{source.answer_field}'"
        )
    return Row(
        row_id=f"{task}/{index}",
        location=location,
        prompt=checked_prompt(prompt, f"{location}: field '{source.prompt_field}'"),
        answer=answer,
        rejected=None,
        task=task,
        reference={**fields, "answer": answer},
    )


def _pair_row(fields: Mapping[str, object], source: JsonlSource | DatasetsSource, task: str, index: int, location: str) -> Row:
    responses, contexts = [], []
    for option, name in (("chosen_field", source.chosen_field), ("rejected_field", source.rejected_field)):
        where = f"{location}: field '{name}'"
        response, context = response_and_context(value_at(fields, name, option, location), where)
        if not response.strip():
            raise DataError(f"{where} is an empty string; write a response or leave the row out")
        responses.append(response)
        contexts.append(context)
    chosen, rejected = responses
    if (contexts[0] is None) != (contexts[1] is None):
        chat, text = (source.chosen_field, source.rejected_field)[:: -1 if contexts[0] is None else 1]
        raise DataError(f"{location}: field '{chat}' is a list; it must be a string, as '{text}' is one, or both chats")
    if chosen == rejected:
        raise DataError(
            f"{location}: fields '{source.chosen_field}' and '{source.rejected_field}' are equal, so neither is preferred; "
            "leave the row out"
        )
    return Row(
        row_id=f"{task}/{index}",
        location=location,
        prompt=_pair_prompt(fields, source, contexts, location),
        answer=chosen,
        rejected=rejected,
        task=task,
        reference={**fields, "answer": chosen},
    )


def _pair_prompt(
    fields: Mapping[str, object],
    source: JsonlSource | DatasetsSource,
    contexts: Sequence[list[ChatMessage] | None],
    location: str,
) -> str | list[ChatMessage]:
    """Return the prompt of a pair: its field's, or what both responses, given as chats, begin with."""
    where = f"{location}: field '{source.prompt_field}'"
    if source.prompt_field == source.chosen_field:
        if contexts[0] is None or contexts[0] != contexts[1]:
            raise DataError(f"{where} is prompt and chosen response, so both must be chats that begin alike; give prompts")
        return checked_prompt(contexts[0], where)
    prompt = checked_prompt(value_at(fields, source.prompt_field, "prompt_field", location), where)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for name, context in zip((source.chosen_field, source.rejected_field), contexts, strict=True):
        if context and context != messages:
            raise DataError(
                f"{location}: the chat in field '{name}' does not begin with the prompt in '{source.prompt_field}'; set "
                f"prompt_field: {source.chosen_field} to take the prompt from there"
            )
    return prompt


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
        location = f"dataset {self._source.path} split '{self._source.split}' row {index}"
        try:
            fields = self._dataset[index]
        except Exception as error:  # of a file behind it that is damaged or no UTF-8
            raise DataError(f"{location} cannot be read: {one_line(error)[:120]}; write the dataset again") from error
        return self._make_row(fields, self._source, self._task, index, location)


def load_dataset(source: DatasetsSource) -> Any:
    """Load the split as a datasets.Dataset; DataError when there is none."""
    import datasets  # here, because it takes seconds and other sources do without

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs of a broken file, the error says
    path = Path(source.path)
    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if is_saved:
            loaded = datasets.load_from_disk(source.path)
        elif path.is_file():
            loaded = datasets.Dataset.from_file(source.path)
        else:
            loaded = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        reason = one_line(error)[:120]
        raise DataError(f"cannot load dataset {source.path} split '{source.split}': {reason}; check path and split") from error
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
            location=f"reasoning_gym {self._source.task} entry {index}",
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
        raise DataError(f"reasoning_gym task '{source.task}' refuses options {source.options}: {one_line(error)}") from error
