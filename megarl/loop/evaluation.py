"""When a run is evaluated, and what is measured on held-out prompts."""

from collections.abc import Callable

from megarl.config.schema import EvaluationConfig
from megarl.loop.prompts import accuracy_name
from megarl.loop.rollout_manager import RolloutManager
from megarl.loop.run import Run
from megarl.observe.reporter import Reporter

Measure = Callable[[], dict[str, float]]  # collective; equal on all ranks


class Evaluation:
    """Measures a run before its first step, every ``evaluation.every`` steps and at its end; every rank calls every method.

    Args:
        config: the section of the run, or of its stage.
        run: its position.
        reporter: of this rank.
        measure: gives the metrics; None where nothing is held out.
    """

    def __init__(self, config: EvaluationConfig, run: Run, reporter: Reporter, measure: Measure | None) -> None:
        self._every = config.every
        self._run = run
        self._reporter = reporter
        self._measure = measure

    def at_start(self) -> None:
        """Evaluate before the first step; a resumed run has done so already."""
        if self._run.step == 0 and self._measure is not None:
            self._reporter.metrics(0, self._measure())

    def after_step(self, reward_mean: float | None = None) -> dict[str, float]:
        """Evaluate if due; the metrics, none if not.

        The end of a stage, which an evaluation may bring about, is evaluated as the end of the run is.

        Args:
            reward_mean: over the responses that the step sampled, where the run is a stage of a curriculum.
        """
        run = self._run
        is_due = run.step == run.last_step or run.is_due(self._every)
        metrics = self._measure_in_time() if is_due else {}
        if run.stage is not None and reward_mean is not None:
            run.stage.observe(run.step, reward_mean, metrics.get(accuracy_name(run.stage.stage)))
            if run.stage.is_over and not is_due:
                metrics = self._measure_in_time()
        return metrics

    def _measure_in_time(self) -> dict[str, float]:
        if self._measure is None:
            return {}
        with self._run.timer.phase("evaluate"):
            return self._measure()


def measure_responses(run: Run, rollout: RolloutManager, reporter: Reporter) -> dict[str, float]:
    """Answer the held-out prompts with the engine's weights, and report the responses and their accuracies."""
    metrics, groups = rollout.evaluate()
    reporter.evaluation_responses(run.step, groups)
    reporter.message(f"step {run.step}: held-out " + ", ".join(f"{name} {value:.1%}" for name, value in metrics.items()))
    return metrics
