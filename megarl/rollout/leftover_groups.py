"""Which groups a step trains on, and which wait for the next one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.config.schema import Config
from megarl.config.tasks import TRAIN, tasks_of
from megarl.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverGroup:
    """A group that can be trained on, and the step that sampled it."""

    step: int
    group: RolloutGroup


def groups_per_task(config: Config) -> int | None:
    """Return how many groups of each task a step has when tasks are balanced; None when they are not."""
    if config.data.sampling.mixture != "balanced":
        return None
    return config.rollout.prompts_per_step // len(tasks_of(config.data.train, TRAIN))


def fill_step(waiting: Sequence[LeftoverGroup], num_groups: int, per_task: int | None) -> list[LeftoverGroup]:
    """Choose the groups that a step trains on, the oldest first; fewer than ``num_groups`` while some are missing.

    Args:
        waiting: oldest first.
        num_groups: groups of a step.
        per_task: groups of each task in a step, which then come in turn (a, b, a, b ...), so that mini-batches are balanced too;
            None takes them as they come.
    """
    if per_task is None:
        return list(waiting[:num_groups])
    taken: list[tuple[int, LeftoverGroup]] = []
    counts: Counter[str] = Counter()
    for one in waiting:
        task = one.group.prompt.task
        if counts[task] < per_task:
            taken.append((counts[task], one))
            counts[task] += 1
    return [one for _, one in sorted(taken, key=lambda item: (item[0], item[1].group.prompt.task))]
