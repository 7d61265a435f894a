"""Which tasks of reasoning_gym take an answer for a program, and their refusal where there is no sandbox."""

from megarl.builtin.scorers import ReasoningGymScorer
from megarl.builtin.scorers.reasoning_gym import READING_TASKS
from megarl.config.schema import Config, ReasoningGymSource
from megarl.config.tasks import placed_tasks, scorers_of
from megarl.errors import ConfigError
from megarl.workers.sandbox import find_sandbox


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
