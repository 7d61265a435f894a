"""What is found out before the first response is made: whether answers can be compared with, and scored without harm."""

from collections.abc import Callable, Mapping

from megarl.builtin.scorers import AnswerScorer, ReasoningGymScorer, ScorerConfig
from megarl.builtin.scorers.reasoning_gym import READING_TASKS
from megarl.config.schema import Config, ReasoningGymSource
from megarl.config.tasks import placed_tasks, scorers_of
from megarl.errors import ConfigError
from megarl.section import sections_of
from megarl.workers.sandbox import find_sandbox

_COMPARING = {name: section for name, section in sections_of(ScorerConfig).items() if issubclass(section, AnswerScorer)}


def compared_with(scorer: AnswerScorer, reference: Mapping[str, object]) -> list[object]:
    """Return the scorer's type and what it looks at, as JSON values; equal ones need one check."""
    return [scorer.type, *scorer.compared_with(reference)]


def build(argument: object) -> Callable[[list[list[object]]], list[str | None]]:
    """Make the function of a process that checks batches of what ``compared_with`` gives; it needs no argument."""
    return lambda batch: [why_refused(str(scorer), *values) for scorer, *values in batch]


def why_refused(scorer: str, *values: object) -> str | None:
    """Say why a scorer of that type cannot compare responses with these values, and what to do; None where it can."""
    return _COMPARING[scorer].why_refused(*values)


def refuse_evaluating_tasks(config: Config) -> None:
    """Refuse a run whose scorer would execute responses outside a sandbox.

    Raises:
        ConfigError: a task of its data does so, and the machine has no bubblewrap that works.
    """
    if not config.samples_responses or find_sandbox().program is not None:
        return
    for path, task in placed_tasks(config):
        source = task.source
        if not isinstance(source, ReasoningGymSource) or source.task in READING_TASKS:
            continue
        if any(isinstance(scorer, ReasoningGymScorer) for scorer in scorers_of(config, task)):
            raise ConfigError(f"{path}.task: {refusal(source.task)}")


def refusal(task: str) -> str:
    """Say why a task's answers are not scored here, and what helps."""
    return (
        f"scoring {task} executes the answer as code, but {find_sandbox().reason}; install bubblewrap 0.8 or newer "
        "(docs/sandbox.md) or take another task"
    )
