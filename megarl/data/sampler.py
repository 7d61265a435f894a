"""The rows of a run's tasks, and the prompts and examples made of them, in an endless, exactly resumable order."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy

from megarl.config.schema import Config, Rows, TaskConfig
from megarl.config.tasks import EVALUATION, TRAIN, tasks_of
from megarl.data.order import RowSampler, TaskChooser
from megarl.data.row_sizes import RowSizes, naming_row
from megarl.data.sources import Row, number_at, read_rows
from megarl.data.template import PreferencePair, SFTExample, prompt_template
from megarl.data.too_long import cut_in_the_middle, pair_tokens, rows_in_limits
from megarl.errors import CheckpointError, DataError
from megarl.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """The rows of one task that are trained on.

    Attributes:
        rows: all rows of the task's source; some may be made on access.
        kept: int64, ascending indices of those that are trained on.
        sampler: their order; it counts within ``kept``.
    """

    rows: Sequence[Row]
    kept: numpy.ndarray
    sampler: RowSampler


class _Source(Generic[Item]):
    """Rows of one or several tasks, encoded when taken.

    Args:
        tasks: by name, in the order of the config.
        encode: makes the item of a row.
        chooser: says which task comes next.
    """

    def __init__(self, tasks: Mapping[str, TaskRows], encode: Callable[[Row], Item], chooser: TaskChooser) -> None:
        self._tasks = tasks
        self._encode = encode
        self._chooser = chooser
        self._taken = 0

    def take(self, count: int, held: Mapping[str, int] | None = None) -> list[Item]:
        """Return the next ``count`` items.

        Args:
            count: items wanted.
            held: for balanced mixtures, the items of each task that the step has already.
        """
        tasks = list(self._tasks.values())
        numbers = self._chooser.choose(self._taken, count, [(held or {}).get(name, 0) for name in self._tasks])
        self._taken += count
        rows = [iter(task.sampler.next(numbers.count(number))) for number, task in enumerate(tasks)]
        return [self._encode(tasks[number].rows[int(tasks[number].kept[next(rows[number])])]) for number in numbers]

    def state(self) -> dict[str, Any]:
        """Return the position for a checkpoint, as JSON values."""
        return {"taken": self._taken, "tasks": {name: task.sampler.state() for name, task in self._tasks.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state()`` was taken; CheckpointError when the tasks or their rows are others."""
        if list(state["tasks"]) != list(self._tasks):
            raise CheckpointError(
                f"the checkpoint was made with the tasks {', '.join(state['tasks'])} in data.train but this run has "
                f"{', '.join(self._tasks)}; resume with the data of the interrupted run"
            )
        self._taken = state["taken"]
        for name, task in self._tasks.items():
            task.sampler.restore(state["tasks"][name])


class PromptSource(_Source[Prompt]):
    """Prompts for rollouts. A ``prompt_id`` comes back in each pass over its task's rows."""

    def rows(self) -> Iterator[Row]:
        """Return all rows that are trained on."""
        for task in self._tasks.values():
            for index in task.kept:
                yield task.rows[int(index)]

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt of that id, wherever the order stands."""
        name, row = row_of(prompt_id)
        return self._encode(self._tasks[name].rows[row])

    def record(self, groups: Iterable[RolloutGroup], pass_threshold: float) -> None:
        """Count what was sampled in one step into the prompts' success rates.

        Args:
            groups: all groups that were sampled and scored, whether they are trained on or not.
            pass_threshold: a response with at least this reward is right.
        """
        shares: dict[str, list[tuple[int, float]]] = {name: [] for name in self._tasks}
        for group in groups:
            name, row = row_of(group.prompt.prompt_id)
            right = sum(scored.reward >= pass_threshold for scored in group.rollouts)
            shares[name].append((int(numpy.searchsorted(self._tasks[name].kept, row)), right / len(group.rollouts)))
        for name, task in self._tasks.items():
            task.sampler.record(shares[name])

    def metrics(self) -> dict[str, float]:
        """Share of the rows that were answered so far, and the mean of their success rates."""
        rates = numpy.concatenate([task.sampler.success.rates for task in self._tasks.values()])
        seen = rates[~numpy.isnan(rates)]
        return {
            "data/seen_share": seen.size / rates.size,
            "data/success_rate_mean": float(seen.mean(dtype=numpy.float64)) if seen.size else 0.0,
        }


def row_of(prompt_id: str) -> tuple[str, int]:
    """Return the task and row of ``task/17``."""
    name, _, row = prompt_id.rpartition("/")
    return name, int(row)


class ExampleSource(_Source[SFTExample]):
    """Examples for supervised fine-tuning."""


class PairSource(_Source[PreferencePair]):
    """Pairs for training on preferences."""


def build_prompt_source(config: Config, tokenizer: "PreTrainedTokenizerBase", sizes: RowSizes | None = None) -> PromptSource:
    """Build the source of the prompts of ``data.train``; every one is checked here, before any hour is spent.

    Args:
        config: the run.
        tokenizer: of the policy.
        sizes: measures the rows; in this process, every time, when not given.

    Raises:
        DataError: a row is malformed, a prompt too long, or no row remains after ``data.exclude``.
    """
    encode = _prompt_encoder(config, tokenizer)
    tasks = _checked_training_rows(config, encode, sizes or RowSizes(config, tokenizer), "prompts")
    return PromptSource(tasks, encode, _task_chooser(config))


def _prompt_encoder(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Callable[[Row], Prompt]:
    template = prompt_template(config, tokenizer)
    longest = config.rollout.max_prompt_tokens

    def encode(row: Row) -> Prompt:
        if config.data.too_long == "cut_middle":
            return cut_in_the_middle(template.encode_prompt(row), longest, tokenizer)
        return template.encode_prompt(row, longest)

    return encode


def build_sft_source(config: Config, tokenizer: "PreTrainedTokenizerBase", sizes: RowSizes | None = None) -> ExampleSource:
    """Build the source of the examples of ``data.train``; every one is checked here, before any hour is spent.

    Raises:
        DataError: a row is malformed, an example too long, or no row remains after ``data.exclude``.
    """
    template = prompt_template(config, tokenizer)

    def encode(row: Row) -> SFTExample:
        return template.encode_example(row, config.data.response_suffix, config.sft.max_tokens)

    tasks = _checked_training_rows(config, encode, sizes or RowSizes(config, tokenizer), "examples")
    return ExampleSource(tasks, encode, _task_chooser(config))


def build_pair_source(config: Config, tokenizer: "PreTrainedTokenizerBase", sizes: RowSizes | None = None) -> PairSource:
    """Build the source of the pairs of ``data.train``; every one is checked here, before any hour is spent.

    Raises:
        DataError: a row is malformed, a response too long, a pair too long for a micro-batch, or no row remains after
            ``data.exclude``.
    """
    template = prompt_template(config, tokenizer)
    policy, end = config.policy, config.tokens_behind

    def encode(row: Row) -> PreferencePair:
        pair = template.encode_pair(row, config.data.response_suffix, config.preference.max_tokens)
        lengths = [len(response.token_ids) for response in (pair.chosen, pair.rejected)]
        if pair_tokens(config, numpy.array([lengths]))[0] > policy.max_tokens_per_micro_batch:
            cp = policy.parallel.cp
            padded = f", each padded to a multiple of {2 * cp} for cp {cp}" if cp > 1 else ""
            raise DataError(
                f"the pair of row {row.row_id} has {lengths[0] + end} + {lengths[1] + end} tokens{padded}, computed together: "
                f"above policy.max_tokens_per_micro_batch = {policy.max_tokens_per_micro_batch}; raise it or leave the row out"
            )
        return pair

    tasks = _checked_training_rows(config, encode, sizes or RowSizes(config, tokenizer), "pairs")
    return PairSource(tasks, encode, _task_chooser(config))


def build_evaluation_pairs(config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[PreferencePair]:
    """Build all pairs of ``evaluation.data`` in their order; none when it is not given. Raises DataError as the others do."""
    if config.evaluation.data is None:
        return []
    template = prompt_template(config, tokenizer)
    return [
        naming_row(row, template.encode_pair, row, config.data.response_suffix, config.preference.max_tokens)
        for task in tasks_of(config.evaluation.data, EVALUATION)
        for row in read_rows(task.source, task.name, in_pairs=True)
    ]


def build_evaluation_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """Build all prompts of ``evaluation.data`` in their order; none when it is not given. Raises DataError as the others do."""
    if config.evaluation.data is None:
        return []
    whole = prompt_template(config, tokenizer)
    rows = [row for task in tasks_of(config.evaluation.data, EVALUATION) for row in read_rows(task.source, task.name)]
    sizes = numpy.array([[len(naming_row(row, whole.encode_prompt, row).token_ids)] for row in rows])
    encode = _prompt_encoder(config, tokenizer)
    kept = rows_in_limits(config, "evaluation.data", rows, sizes, "prompts", encode)
    return [encode(row) for row, is_kept in zip(rows, kept, strict=True) if is_kept]


class IndexedRows(Sequence[Row]):
    """The rows of those indices, made when asked for."""

    def __init__(self, rows: Sequence[Row], indices: numpy.ndarray) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._rows[int(index)] for index in self._indices[index]]
        return self._rows[int(self._indices[index])]


def _task_chooser(config: Config) -> TaskChooser:
    weights = [task.weight for task in tasks_of(config.data.train, TRAIN)]
    return TaskChooser(weights, config.seed, balanced=config.data.sampling.mixture == "balanced")


def excluded_texts(config: Config) -> set[str]:
    """Return the prompts that ``data.exclude`` names."""
    return {
        row.prompt_text for source in config.data.exclude for row in read_rows(source, "exclude", in_pairs=config.trains_on_pairs)
    }


def training_rows(
    config: Config, task: TaskConfig, excluded: set[str]
) -> tuple[Sequence[Row], numpy.ndarray, numpy.ndarray | None]:
    """Return the rows of a task, the indices (int64, ascending) of those that are not excluded, and their difficulties.

    Raises:
        DataError: a row is malformed, none remains, or one lacks its difficulty.
    """
    field = config.data.sampling.difficulty_field
    rows = read_rows(task.source, task.name, in_pairs=config.trains_on_pairs)
    kept = [index for index, row in enumerate(rows) if row.prompt_text not in excluded]
    if not kept:
        raise DataError(f"data.exclude leaves none of the {len(rows)} rows of task {task.name}; take other rows for one of them")
    if field is None:
        return rows, numpy.array(kept), None
    difficulties = [number_at(rows[index], field, "data.sampling.difficulty_field") for index in kept]
    return rows, numpy.array(kept), numpy.array(difficulties)


def _checked_training_rows(config: Config, encode: Callable[[Row], object], sizes: RowSizes, form: Rows) -> dict[str, TaskRows]:
    """Return the rows of ``data.train`` by task that ``data.exclude`` does not name, each of which ``encode`` accepts."""
    tasks, excluded = {}, excluded_texts(config)
    for number, task in enumerate(tasks_of(config.data.train, TRAIN)):
        rows, kept, difficulties = training_rows(config, task, excluded)
        name = "data.train" if task.name == TRAIN else f"data.train {task.name}"
        candidates = IndexedRows(rows, kept)
        is_kept = rows_in_limits(config, name, candidates, sizes.measure(name, candidates, form), form, encode)
        kept = kept[is_kept]
        difficulties = None if difficulties is None else difficulties[is_kept]
        sampler = RowSampler(len(kept), config.seed, config.data.sampling, task=number, difficulties=difficulties)
        tasks[task.name] = TaskRows(rows=rows, kept=kept, sampler=sampler)
    return tasks
