"""Checks of rollout.environment and of what goes with it; one line for each mistake."""

from collections.abc import Iterator

from megarl.config.schema import Config, ReasoningGymSource
from megarl.config.tasks import placed_scorers, placed_tasks


def check_environment(config: Config) -> Iterator[str]:
    """All checks of this file."""
    environment = config.rollout.environment
    if environment is None:
        return
    yield from (f"rollout.environment.{line}" for line in environment.mistakes())
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
            if scorer.step_end is not None:
                yield f"{path}.{index}.step_separator: steps are of one turn, rollout.environment makes several; remove one of them"
    if environment.plays is not None:
        for path, played in placed_tasks(config):
            source = played.source
            task = source.task if isinstance(source, ReasoningGymSource) else f"of type {source.type}"
            if task != environment.plays:
                yield (
                    f"rollout.environment.type: {environment.type} plays reasoning_gym's task {environment.plays} and {path} is "
                    f"{task}; use another source or environment"
                )
