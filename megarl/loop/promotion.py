"""How far a stage of the curriculum is, and when it is over."""

from collections.abc import Sequence
from typing import Any, Self

from megarl.config.stages import Stage
from megarl.errors import CheckpointError


class StageProgress:
    """Position in one stage. Equal on all ranks, which all observe the same.

    Attributes:
        stage: which.
        start_step: steps of the run before it.
        ended_by: what ended the stage, for people; empty while it goes on.
    """

    def __init__(self, stage: Stage, start_step: int) -> None:
        self.stage = stage
        self.start_step = start_step
        self.ended_by = ""
        self._rewards: list[float] = []

    @property
    def is_over(self) -> bool:
        """Whether the next stage, or the end of the run, comes now."""
        return bool(self.ended_by)

    @property
    def num_steps(self) -> int:
        """Done in the stage."""
        return len(self._rewards)

    @property
    def last_step(self) -> int:
        """Of the run: the stage does not go beyond it."""
        return self.start_step + self.stage.steps

    def observe(self, step: int, reward: float, accuracy: float | None) -> None:
        """Count a step.

        Args:
            step: of the run, this one included.
            reward: mean over the responses that the step sampled.
            accuracy: on the held-out prompts of the stage's own lengths, where the step ended with an evaluation.
        """
        self._rewards.append(reward)
        self.ended_by = self._reason(step, accuracy)

    def _reason(self, step: int, accuracy: float | None) -> str:
        promotion, num_steps = self.stage.promotion, step - self.start_step
        if promotion is not None and num_steps >= promotion.min_steps:
            if promotion.accuracy is not None and accuracy is not None and accuracy >= promotion.accuracy:
                return f"held-out accuracy {accuracy:.1%} reached {promotion.accuracy:.1%}"
            window = promotion.plateau_window
            if window is not None and len(self._rewards) >= 2 * window:
                before, now = _mean(self._rewards[-2 * window : -window]), _mean(self._rewards[-window:])
                if now - before < promotion.plateau_gain:
                    return f"mean reward went from {before:.3f} to {now:.3f} in {window} steps"
        return f"{self.stage.steps} steps" if step >= self.last_step else ""

    def state(self) -> dict[str, Any]:
        """Return the position for a checkpoint, as JSON values."""
        return {
            "number": self.stage.number,
            "name": self.stage.name,
            "start_step": self.start_step,
            "ended_by": self.ended_by,
            "rewards": list(self._rewards),
        }

    @classmethod
    def restore(cls, stages: Sequence[Stage], state: dict[str, Any]) -> Self:
        """Continue where ``state()`` was taken.

        Raises:
            CheckpointError: the run has other stages.
        """
        number = state["number"]
        if number >= len(stages) or stages[number].name != state["name"]:
            names = ", ".join(stage.name for stage in stages)
            raise CheckpointError(
                f"the checkpoint is in stage {number}, {state['name']!r}, of its curriculum and this run has the stages {names}; "
                "resume with the curriculum of the interrupted run"
            )
        progress = cls(stages[number], state["start_step"])
        progress.ended_by = state["ended_by"]
        progress._rewards = list(state["rewards"])
        return progress


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
