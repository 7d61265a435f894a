"""Checks of rollout.environment and of what goes with it; one line for each mistake."""

from collections.abc import Iterator

from megarl.config.names import FUNCTION_PATTERN
from megarl.config.schema import Config, EnvironmentConfig, ReasoningGymSource
from megarl.config.tasks import placed_scorers, placed_tasks

GAMES = ("tower_of_hanoi",)  # environments of reasoning-gym's tasks, by the task's name


def check_environment(config: Config) -> Iterator[str]:
    """All checks of this file."""
    environment = config.rollout.environment
    if environment is None:
        return
    yield from _check_class(environment)
    template = environment.observation_template
    if template is None and config.data.template != "chat":
        yield (
            f"rollout.environment.observation_template: is not given and data.template {config.data.template!r} is no chat; give a "
            "text with {observation} in it"
        )
    if template is not None and template.count("{observation}") != 1:
        yield f"rollout.environment.observation_template: {template!r} must have {{observation}} in it, once"
    for path, scorers in placed_scorers(config):
        for index, scorer in enumerate(scorers):
            if scorer.name == "environment":
                yield f"{path}.{index}.name: 'environment' is the name of the environment's rewards; give another name"
            if scorer.step_separator is not None:
                yield f"{path}.{index}.step_separator: steps are of one turn, rollout.environment makes several; remove one of them"
    if environment.type in GAMES:
        for path, played in placed_tasks(config):
            source = played.source
            task = source.task if isinstance(source, ReasoningGymSource) else f"of type {source.type}"
            if task != environment.type:
                yield (
                    f"rollout.environment.type: {environment.type} plays reasoning_gym's task {environment.type} and {path} is "
                    f"{task}; use another source or environment"
                )


def _check_class(environment: EnvironmentConfig) -> Iterator[str]:
    function = environment.function
    if environment.type != "python" and function is not None:
        yield f"rollout.environment.function: {function!r} has no use for type {environment.type}; remove it or use type python"
    if environment.type == "python" and (function is None or not FUNCTION_PATTERN.fullmatch(function)):
        given = "is required" if function is None else f"{function!r} is not module:Class"
        yield f"rollout.environment.function: {given} for type python; give for example my_package.environments:Shop"
