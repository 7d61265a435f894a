"""An endless, exactly resumable order over rows, and the prompts and examples taken in that order."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy

from megarl.config.schema import Config, DataConfig
from megarl.data.sources import Row, read_rows
from megarl.data.template import PromptTemplate, SFTExample
from megarl.errors import CheckpointError, DataError
from megarl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


class RowSampler:
    """Row indices, epoch after epoch; the order of an epoch depends only on ``(seed, epoch)``."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        assert num_rows > 0
        self._identity = {"num_rows": num_rows, "seed": seed, "shuffle": shuffle}
        self._epoch = 0
        self._position = 0
        self._order = self._permutation()

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices; they may span epochs."""
        indices: list[int] = []
        while len(indices) < count:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation()
            taken = self._order[self._position : self._position + count - len(indices)]
            self._position += len(taken)
            indices.extend(taken)
        return indices

    def state(self) -> dict[str, int]:
        """Where the sampler is, as JSON values."""
        return {**self._identity, "epoch": self._epoch, "position": self._position}

    def restore(self, state: dict[str, int]) -> None:
        """Continue exactly where ``state()`` was taken.

        Raises:
            CheckpointError: the state belongs to another number of rows, seed or shuffling, or lacks an entry.
        """
        missing = self.state().keys() - state.keys()
        if missing:
            raise CheckpointError(
                f"the checkpoint's data position lacks {', '.join(sorted(missing))}; resume from an intact checkpoint"
            )
        for name, here in self._identity.items():
            if state[name] != here:
                raise CheckpointError(
                    f"the checkpoint was made with {name} = {state[name]} for data.train but this run has {here}; "
                    "resume with the data and seed of the interrupted run"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        if not self._identity["shuffle"]:
            return list(range(self._identity["num_rows"]))
        # RandomState's stream is frozen for ever by NumPy's policy (NEP 19); Generator's may change between versions.
        bits = numpy.random.MT19937(numpy.random.SeedSequence([self._identity["seed"], self._epoch]))
        return numpy.random.RandomState(bits).permutation(self._identity["num_rows"]).tolist()


class _Source(Generic[Item]):
    """Rows, encoded when taken, in a sampler's order."""

    def __init__(self, rows: Sequence[Row], encode: Callable[[Row], Item], sampler: RowSampler) -> None:
        self._rows = rows
        self._encode = encode
        self._sampler = sampler

    def take(self, count: int) -> list[Item]:
        """The next ``count`` items."""
        return [self._encode(self._rows[index]) for index in self._sampler.next(count)]

    def state(self) -> dict[str, int]:
        """Position for a checkpoint, as JSON values."""
        return self._sampler.state()

    def restore(self, state: dict[str, int]) -> None:
        """Continue exactly where ``state()`` was taken; CheckpointError when the rows differ in number."""
        self._sampler.restore(state)


class PromptSource(_Source[Prompt]):
    """Prompts for rollouts. A ``prompt_id`` comes back in each epoch."""


class ExampleSource(_Source[SFTExample]):
    """Examples for supervised fine-tuning."""


def build_prompt_source(config: Config, tokenizer: "PreTrainedTokenizerBase") -> PromptSource:
    """The prompts of ``data.train``; every one is checked here, before any hour is spent.

    Raises:
        DataError: a row is malformed, a prompt too long, or no row remains after ``data.exclude``.
    """
    template = PromptTemplate(tokenizer, config.data.template)

    def encode(row: Row) -> Prompt:
        return template.encode_prompt(row, config.rollout.max_prompt_tokens)

    rows = _checked_training_rows(config.data, encode)
    return PromptSource(rows, encode, RowSampler(len(rows), config.seed, config.data.shuffle))


def build_sft_source(config: Config, tokenizer: "PreTrainedTokenizerBase") -> ExampleSource:
    """The examples of ``data.train``; every one is checked here, before any hour is spent.

    Raises:
        DataError: a row is malformed, an example too long, or no row remains after ``data.exclude``.
    """
    template = PromptTemplate(tokenizer, config.data.template)

    def encode(row: Row) -> SFTExample:
        return template.encode_example(row, config.data.response_suffix, config.sft.max_tokens)

    rows = _checked_training_rows(config.data, encode)
    return ExampleSource(rows, encode, RowSampler(len(rows), config.seed, config.data.shuffle))


def build_evaluation_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """All prompts of ``evaluation.data`` in their order; none when it is not given. Raises DataError as the others do."""
    if config.evaluation.data is None:
        return []
    template = PromptTemplate(tokenizer, config.data.template)
    rows = read_rows(config.evaluation.data, "evaluation")
    return [template.encode_prompt(row, config.rollout.max_prompt_tokens) for row in rows]


class _SelectedRows(Sequence[Row]):
    """Some rows of a sequence, which may make its rows on access."""

    def __init__(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._indices[index]]


def _checked_training_rows(data: DataConfig, encode: Callable[[Row], object]) -> Sequence[Row]:
    """Rows of ``data.train`` that ``data.exclude`` does not name, each of which ``encode`` accepts."""
    excluded = {row.prompt_text for source in data.exclude for row in read_rows(source, "exclude")}
    rows = read_rows(data.train, "train")
    kept: list[int] = []
    for index, row in enumerate(rows):
        if row.prompt_text not in excluded:
            encode(row)
            kept.append(index)
    if not kept:
        raise DataError(f"data.exclude leaves none of the {len(rows)} rows of data.train; take other rows for one of them")
    return _SelectedRows(rows, kept)
