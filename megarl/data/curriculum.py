"""The prompts of a run with a curriculum: which stage has which, by their lengths, and those of earlier stages among them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from megarl.config.schema import Config, CurriculumConfig
from megarl.config.stages import Stage
from megarl.config.tasks import EVALUATION, TRAIN, tasks_of
from megarl.data.order import RowSampler, SuccessRates, TaskChooser, draw_by_weight, seeded_random
from megarl.data.row_sizes import RowSizes, naming_row
from megarl.data.sampler import IndexedRows, PromptSource, TaskRows, excluded_texts, row_of, training_rows
from megarl.data.sources import Row, read_rows
from megarl.data.template import prompt_template
from megarl.data.too_long import cut_in_the_middle
from megarl.data.too_long import without_middle as without_middle
from megarl.errors import CheckpointError, DataError
from megarl.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EARLIER = (1 << 31) + 1  # keeps the random numbers of earlier stages' prompts apart from those of the rows' and tasks' orders


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTask:
    """All training rows of a task, measured.

    Attributes:
        rows: of the source.
        kept: int64, ascending indices of those that ``data.exclude`` does not name.
        num_tokens: int64 [len(kept)], of their prompts, after the cut where they are cut.
        difficulties: float64 [len(kept)]; None where no field gives them.
        weight: of the task in the mixture.
    """

    rows: Sequence[Row]
    kept: numpy.ndarray
    num_tokens: numpy.ndarray
    difficulties: numpy.ndarray | None
    weight: float


class LengthLimit:
    """What becomes of prompts that are longer than the last stage's: ``curriculum.too_long``.

    Args:
        config: the run, with a curriculum.
        stages: of the run.
        tokenizer: of the policy.

    Attributes:
        longest: tokens that the last stage's prompts have at most.
        too_long: id and tokens of each row above that was measured.
    """

    def __init__(self, config: Config, stages: Sequence[Stage], tokenizer: "PreTrainedTokenizerBase") -> None:
        assert config.curriculum is not None
        self.longest = stages[-1].max_prompt_tokens
        self.too_long: list[tuple[str, int]] = []
        self._cuts = config.curriculum.too_long == "cut_middle"
        self._tokenizer = tokenizer
        self._template = prompt_template(config, tokenizer)

    def measure(self, row: Row) -> int:
        """Return the tokens of the row's prompt, after the cut where it is cut."""
        return self.after_cut(row, len(naming_row(row, self._template.encode_prompt, row).token_ids))

    def after_cut(self, row: Row, size: int) -> int:
        """Return the tokens that are left of the row's prompt where it is cut; ``size`` are those that it has."""
        if size > self.longest:
            self.too_long.append((row.row_id, size))
            if self._cuts:
                return self.longest
        return size

    def encode(self, row: Row) -> Prompt:
        """Return the prompt, without its middle where it is too long."""
        return cut_in_the_middle(self._template.encode_prompt(row), self.longest, self._tokenizer)

    def held_out_prompts(self, config: Config) -> list[Prompt]:
        """Return the prompts of ``evaluation.data`` in their order, without those left out; none when it is not given."""
        if config.evaluation.data is None:
            return []
        rows = [row for task in tasks_of(config.evaluation.data, EVALUATION) for row in read_rows(task.source, task.name)]
        return [self.encode(row) for row in rows if self.measure(row) <= self.longest]


class StagedPrompts:
    """All prompts of a run, measured once; each stage takes its own from here.

    Args:
        config: the run, with a curriculum.
        stages: of the run.
        tokenizer: of the policy.
        sizes: measures the rows; in this process, every time, when not given.

    Raises:
        DataError: a row is malformed, or a stage has no prompt.
    """

    def __init__(
        self, config: Config, stages: Sequence[Stage], tokenizer: "PreTrainedTokenizerBase", sizes: RowSizes | None = None
    ) -> None:
        assert config.curriculum is not None
        sizes = sizes or RowSizes(config, tokenizer)
        self._config, self._curriculum, self._stages = config, config.curriculum, stages
        self._limit = LengthLimit(config, stages, tokenizer)
        self._tasks: dict[str, MeasuredTask] = {}
        excluded = excluded_texts(config)
        for task in tasks_of(config.data.train, TRAIN):
            rows, kept, difficulties = training_rows(config, task, excluded)
            candidates = IndexedRows(rows, kept)
            measured = sizes.measure(f"data.train {task.name}", candidates, "prompts")[:, 0]
            num_tokens = measured.clip(max=self._limit.longest) if self._curriculum.too_long == "cut_middle" else measured
            for position in numpy.flatnonzero(measured > self._limit.longest):
                self._limit.after_cut(candidates[position], int(measured[position]))
            self._tasks[task.name] = MeasuredTask(
                rows=rows, kept=kept, num_tokens=num_tokens, difficulties=difficulties, weight=task.weight
            )
        self._evaluation = self._limit.held_out_prompts(config)
        for stage in stages:
            self._check_filled(stage)

    def rows(self) -> Iterator[Row]:
        """Return all training rows that ``data.exclude`` does not name."""
        for task in self._tasks.values():
            yield from IndexedRows(task.rows, task.kept)

    def source(self, stage: Stage) -> "StageSource":
        """Return the prompts of a stage, at their beginning."""
        config, settings = self._config, self._config.data.sampling
        tasks: dict[str, TaskRows] = {}
        for number, (name, task) in enumerate(self._tasks.items()):
            mine = _in_range(task.num_tokens, stage.above, stage.max_prompt_tokens)
            if not mine.any():
                continue
            sampler = RowSampler(
                int(mine.sum()),
                config.seed,
                settings,
                task=number + stage.number * len(self._tasks),
                difficulties=None if task.difficulties is None else task.difficulties[mine],
            )
            tasks[name] = TaskRows(rows=task.rows, kept=task.kept[mine], sampler=sampler)
        chooser = TaskChooser([self._tasks[name].weight for name in tasks], config.seed, balanced=settings.mixture == "balanced")
        return StageSource(
            tasks,
            self._limit.encode,
            chooser,
            stage=stage.number,
            rows={name: task.rows for name, task in self._tasks.items()},
            earlier={name: task.kept[_in_range(task.num_tokens, 0, stage.above)] for name, task in self._tasks.items()},
            rewards={name: SuccessRates(len(task.rows), settings.success_update) for name, task in self._tasks.items()},
            curriculum=self._curriculum,
            seed=config.seed,
        )

    def evaluation_prompts(self, stage: Stage) -> list[Prompt]:
        """Return the held-out prompts that fit into a stage."""
        return [prompt for prompt in self._evaluation if len(prompt.token_ids) <= stage.max_prompt_tokens]

    def report(self) -> dict[str, Any]:
        """Return how many prompts fell where, as JSON values; those that no stage has by their ids."""
        return {
            "stages": [self._statistics(stage) for stage in self._stages],
            self._curriculum.too_long: [{"prompt_id": name, "num_tokens": size} for name, size in self._limit.too_long],
        }

    def lines(self) -> list[str]:
        """Return the report as lines for people."""
        lines = []
        for one in self.report()["stages"]:
            tokens = f"{one['min_tokens']} to {one['max_tokens']} tokens (median {one['median_tokens']})"
            lines.append(f"stage {one['name']}: {one['num_prompts']} prompts of {tokens}, {one['num_held_out']} held out")
        if too_long := self._limit.too_long:
            verb = "left out" if self._curriculum.too_long == "leave_out" else "cut in their middle"
            longest = max(size for _, size in too_long)
            lines.append(
                f"{len(too_long)} prompts are longer than the last stage's {self._limit.longest} tokens (the longest {longest}) "
                f"and {verb}; curriculum.json lists them"
            )
        return lines

    def _statistics(self, stage: Stage) -> dict[str, Any]:
        sizes = numpy.sort(self._sizes(stage))
        held_out = [len(prompt.token_ids) for prompt in self._evaluation]
        return {
            "name": stage.name,
            "above": stage.above,
            "max_prompt_tokens": stage.max_prompt_tokens,
            "num_prompts": len(sizes),
            "min_tokens": int(sizes[0]),
            "median_tokens": int(sizes[len(sizes) // 2]),
            "max_tokens": int(sizes[-1]),
            "num_held_out": sum(stage.above < size <= stage.max_prompt_tokens for size in held_out),
        }

    def _sizes(self, stage: Stage) -> numpy.ndarray:
        sizes = numpy.concatenate([task.num_tokens for task in self._tasks.values()])
        return sizes[_in_range(sizes, stage.above, stage.max_prompt_tokens)]

    def _check_filled(self, stage: Stage) -> None:
        if self._sizes(stage).size:
            return
        sizes = numpy.concatenate([task.num_tokens for task in self._tasks.values()])
        raise DataError(
            f"{stage.path}.max_prompt_tokens: no prompt of data.train has {stage.above + 1} to {stage.max_prompt_tokens} tokens, "
            f"so stage {stage.name!r} is empty (the prompts have {sizes.min()} to {sizes.max()}); choose other lengths, or leave "
            "the stage out"
        )


class StageSource(PromptSource):
    """The prompts of one stage, some of earlier stages among them (difficulty-aware retrospective sampling, arXiv 2505.17667).

    Args:
        tasks, encode, chooser: of the stage's own prompts.
        stage: its number.
        rows: by task, all rows of the source.
        earlier: by task, the rows of earlier stages.
        rewards: by task, the mean reward of each row of the source.
        curriculum: share and floor.
        seed: of the run.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskRows],
        encode: Callable[[Row], Prompt],
        chooser: TaskChooser,
        *,
        stage: int,
        rows: Mapping[str, Sequence[Row]],
        earlier: Mapping[str, numpy.ndarray],
        rewards: Mapping[str, SuccessRates],
        curriculum: CurriculumConfig,
        seed: int,
    ) -> None:
        super().__init__(tasks, encode, chooser)
        self._stage = stage
        self._rows = rows
        self._earlier = [(name, int(row)) for name, rows in earlier.items() for row in rows]
        self._rewards = rewards
        self._curriculum = curriculum
        self._seed = seed
        self._position = 0  # prompts taken in this stage
        self._pending: set[tuple[str, int]] = set()  # earlier stages' that were taken since the last record
        self._earlier_share = 0.0  # of the groups of the last record

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt of that id, of any stage."""
        name, row = row_of(prompt_id)
        return self._encode(self._rows[name][row])

    def take(self, count: int, held: Mapping[str, int] | None = None) -> list[Prompt]:
        """Take the next ``count`` prompts; every 1 / share-th is an answered one of an earlier stage, while some are left."""
        share = self._curriculum.retrospective_share
        places = range(self._position, self._position + count)
        self._position += count
        slots = [int((position + 1) * share) > int(position * share) for position in places]
        earlier = self._draw(sum(slots), places.start)
        tasks = dict(held or {})
        for prompt in earlier:
            tasks[prompt.task] = tasks.get(prompt.task, 0) + 1
        own = super().take(count - len(earlier), tasks)
        return [earlier.pop(0) if slot and earlier else own.pop(0) for slot in slots]

    def record(self, groups: Iterable[RolloutGroup], pass_threshold: float) -> None:
        """Count what was sampled in one step into the stage's success rates and into the rows' mean rewards."""
        groups = list(groups)
        own = []
        for group in groups:
            name, row = row_of(group.prompt.prompt_id)
            mean = sum(scored.reward for scored in group.rollouts) / len(group.rollouts)
            self._rewards[name].record(row, mean)
            if self._is_own(name, row):
                own.append(group)
        super().record(own, pass_threshold)
        self._pending.clear()
        self._earlier_share = 1 - len(own) / max(1, len(groups))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the stage's own prompts, the stage, and the share of earlier stages' prompts in the last step."""
        return super().metrics() | {"curriculum/stage": float(self._stage), "curriculum/earlier_share": self._earlier_share}

    def state(self) -> dict[str, Any]:
        """Return the position for a checkpoint, as JSON values."""
        return super().state() | {
            "stage": self._stage,
            "place": self._position,
            "pending": sorted(f"{name}/{row}" for name, row in self._pending),
            "rewards": {name: rewards.state() for name, rewards in self._rewards.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state()`` was taken; of the state of an earlier stage only the mean rewards are taken over.

        Raises:
            CheckpointError: the tasks or their rows are others, or the state is that of a run without curriculum.
        """
        if "stage" not in state:
            raise CheckpointError("the checkpoint is of a run without curriculum; remove curriculum to go on with that run")
        if state["rewards"].keys() != self._rewards.keys():
            raise CheckpointError(
                f"the checkpoint was made with the tasks {', '.join(state['rewards'])} in data.train but this run has "
                f"{', '.join(self._rewards)}; resume with the data of the interrupted run"
            )
        for name, rewards in self._rewards.items():
            rewards.restore(state["rewards"][name])
        if state["stage"] == self._stage:
            super().restore(state)
            self._position = state["place"]
            self._pending = {row_of(prompt_id) for prompt_id in state["pending"]}

    def _is_own(self, name: str, row: int) -> bool:
        if name not in self._tasks:
            return False
        kept = self._tasks[name].kept
        at = int(numpy.searchsorted(kept, row))
        return at < len(kept) and int(kept[at]) == row

    def _draw(self, count: int, position: int) -> list[Prompt]:
        """Up to ``count`` different prompts of earlier stages that were answered, in proportion to 1 / mean reward."""
        if not count:
            return []
        means = numpy.array([self._rewards[name].rates[row] for name, row in self._earlier], dtype=numpy.float64)
        weights = 1.0 / numpy.maximum(means, self._curriculum.retrospective_floor)
        pending = [index for index, key in enumerate(self._earlier) if key in self._pending]
        random = seeded_random(self._seed, position, self._stage, EARLIER)
        drawn = [self._earlier[index] for index in draw_by_weight(random, weights, pending, count)]
        self._pending.update(drawn)
        return [self.prompt(f"{name}/{row}") for name, row in drawn]


def _in_range(num_tokens: numpy.ndarray, above: int, longest: int) -> numpy.ndarray:
    return (num_tokens > above) & (num_tokens <= longest)
