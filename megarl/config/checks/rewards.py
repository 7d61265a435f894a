"""Checks of the scorers of all tasks; lines start with the key."""

from collections.abc import Iterator, Sequence

from megarl.builtin.scorers import BaseScorer, DocumentQAScorer, ReasoningGymScorer
from megarl.config.schema import Config, ReasoningGymSource
from megarl.config.tasks import placed_scorers, placed_tasks, scorers_of


def check_rewards(config: Config) -> Iterator[str]:
    """There is a scorer where responses are scored, and the log can tell scorers apart."""
    for path, scorers in placed_scorers(config):
        yield from _check_scorers(path, scorers)
    scored = [
        (path, task)
        for path, task in placed_tasks(config)
        if config.samples_responses and (config.learns_from_samples or path.startswith("evaluation"))
    ]
    for path, task in scored:
        scorers = scorers_of(config, task)
        is_training = path.startswith("data.train")
        has_others = config.rollout.environment is not None or (is_training and config.reward_model is not None)
        if not scorers and not has_others:
            user = "kind: rl" if is_training else "evaluation.data"
            yield f"rewards.scorers: is empty and {user} needs at least one; add for example - type: math"
            break
        if any(isinstance(scorer, ReasoningGymScorer) for scorer in scorers) and not isinstance(task.source, ReasoningGymSource):
            key = f"{path.removesuffix('source')}scorers" if task.scorers else "rewards.scorers"
            yield f"{key}: reasoning_gym scores only its own tasks, and {path} has type {task.source.type}; use another scorer"


def _check_scorers(path: str, scorers: Sequence[BaseScorer]) -> Iterator[str]:
    """Each scorer of one list is whole, and has a name of its own."""
    seen: dict[str, int] = {}
    for index, scorer in enumerate(scorers):
        name = scorer.log_name
        if name in seen:
            yield f"{path}.{index}.name: {name!r} is also the name of scorer {seen[name]}; give one of them another name"
        seen.setdefault(name, index)
        yield from (f"{path}.{index}.{line}" for line in scorer.mistakes())


def check_judges(config: Config) -> Iterator[str]:
    """A judge's requests fit into the time of a prompt, and a scorer's parts have log names of their own."""
    limit = config.rollout.time_limit(0)
    for path, scorers in placed_scorers(config):
        names = [scorer.log_name for scorer in scorers]
        for index, scorer in enumerate(scorers):
            for part in scorer.log_names()[1:]:
                if part in names:
                    yield f"{path}.{index}.name: the scorer logs its part {part}, another scorer's name; rename one of them"
            judge = scorer.judge if isinstance(scorer, DocumentQAScorer) else None
            if judge is not None and judge.longest_wait > limit:
                yield (
                    f"{path}.{index}.judge.timeout: {judge.retries + 1} requests of {judge.timeout:g} s and the waits between them "
                    f"take up to {judge.longest_wait:g} s, above the {limit:g} s of rollout.request_timeout; lower timeout or "
                    "retries, or raise rollout.request_timeout"
                )
