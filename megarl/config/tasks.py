"""Tasks: the named sources of rows that a data source consists of, and the scorers of each."""

from collections.abc import Iterator, Mapping, Sequence

from megarl.builtin.scorers import AnswerScorer, BaseScorer
from megarl.config.schema import Config, DataSource, MixtureSource, TaskConfig

TRAIN, EVALUATION = "train", "evaluation"  # names of the tasks of data.train and evaluation.data that are no mixtures


def tasks_of(source: DataSource, name: str) -> list[TaskConfig]:
    """Return the tasks of a mixture; any other source is one task of the given name."""
    return list(source.tasks) if isinstance(source, MixtureSource) else [TaskConfig(name=name, source=source)]


def placed_tasks(config: Config) -> Iterator[tuple[str, TaskConfig]]:
    """Yield every task of the run's training and evaluation data with the dotted path of its rows' source."""
    placed = [("data.train", TRAIN, config.data.train)]
    if config.evaluation.data is not None:
        placed.append(("evaluation.data", EVALUATION, config.evaluation.data))
    for path, name, source in placed:
        for index, task in enumerate(tasks_of(source, name)):
            yield f"{path}.tasks.{index}.source" if isinstance(source, MixtureSource) else path, task


def task_scorers(config: Config) -> Mapping[str, Sequence[BaseScorer]]:
    """Return the scorers of every task that has its own; those of a training task are also of the evaluation task of its name."""
    return {task.name: task.scorers for _, task in reversed(list(placed_tasks(config))) if task.scorers}


def placed_scorers(config: Config) -> Iterator[tuple[str, Sequence[BaseScorer]]]:
    """Yield every list of scorers of the run with its dotted path."""
    yield "rewards.scorers", config.rewards.scorers
    for path, task in placed_tasks(config):
        if task.scorers:
            yield f"{path.removesuffix('source')}scorers", task.scorers


def correct_scorers(config: Config, task: TaskConfig) -> tuple[str, ...]:
    """Return the names of the scorers of a task that say whether a response is correct.

    Returns:
        Those that ``correct_scorers`` names, else those that compare with the right answer, else the task's only one; none where
        it has several and none of these says so, or none at all.
    """
    scorers = scorers_of(config, task)
    given = config.algorithm.reward_shaping.correct_scorers
    if given:
        return tuple(scorer.log_name for scorer in scorers if scorer.log_name in given)
    comparing = tuple(scorer.log_name for scorer in scorers if isinstance(scorer, AnswerScorer))
    return comparing or tuple(scorer.log_name for scorer in scorers if len(scorers) == 1)


def scorers_of(config: Config, task: TaskConfig) -> Sequence[BaseScorer]:
    """Return the scorers of a task's responses."""
    return task_scorers(config).get(task.name, config.rewards.scorers)
