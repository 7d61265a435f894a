"""Where a run is."""

from megarl.loop.promotion import StageProgress
from megarl.observe.timers import PhaseTimer
from megarl.parallel.rank_board import announce_phase


class Run:
    """Position of a run: steps, weight version, and seconds by phase. Equal on every rank but for the seconds.

    Args:
        num_steps: after which it ends.
        stage: of a curriculum, with which it ends.

    Attributes:
        step: steps done.
        weight_version: version of the policy's weights, equal to the steps done.
        stage: position in the stage; None without a curriculum.
        timer: seconds by phase.
    """

    def __init__(self, num_steps: int, stage: StageProgress | None = None) -> None:
        self.step = 0
        self.weight_version = 0
        self.num_steps = num_steps
        self.stage = stage
        self.timer = PhaseTimer(on_phase=self._announce)

    @property
    def is_over(self) -> bool:
        """Whether the last step, of the run or of its stage, is done."""
        return self.step >= self.num_steps if self.stage is None else self.stage.is_over

    @property
    def last_step(self) -> int:
        """The step after which the run ends, or its stage at the latest."""
        return self.num_steps if self.stage is None else self.stage.last_step

    def advance(self) -> None:
        """Count a step: its updates are made, and the engine has the new weights."""
        self.step += 1
        self.weight_version += 1

    def is_due(self, every: int) -> bool:
        """Tell whether what happens after every so many steps, 0 for never, happens after this one."""
        return every > 0 and self.step % every == 0

    def _announce(self, phase: str) -> None:
        announce_phase(f"{'the rest' if phase == 'other' else phase} of step {self.step + (phase != 'save')}")
