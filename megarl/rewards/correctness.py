"""Whether a response's answer is right, whatever else its reward is made of."""

from collections.abc import Callable

from megarl.config.schema import Config
from megarl.config.tasks import TRAIN, correct_scorers, tasks_of
from megarl.types import ScoredRollout


def correctness(config: Config) -> Callable[[ScoredRollout], bool]:
    """Make the function that says whether a training response is correct: by the scores, not weighted, of the scorers that say so.

    They are those of ``config.tasks.correct_scorers``, of which the best counts; a failed scorer says 0. Where a task has none, as
    with an environment alone, the response's reward decides.
    """
    of_task = {task.name: correct_scorers(config, task) for task in tasks_of(config.data.train, TRAIN)}
    least = config.algorithm.reward_shaping.correct_reward

    def is_correct(scored: ScoredRollout) -> bool:
        names = of_task.get(scored.rollout.prompt.task, ())
        score = max(scored.parts.get(name, 0.0) for name in names) if names else scored.reward
        return score >= least

    return is_correct
