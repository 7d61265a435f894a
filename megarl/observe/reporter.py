"""What a run tells people: rank 0 shows and writes it, the other ranks say nothing."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from megarl.config.schema import Config
from megarl.observe.progress import RunProgress
from megarl.observe.sinks import LOGS, MetricsWriter, RolloutWriter, TicketsWriter, first_value, read_log
from megarl.types import RolloutGroup, Tickets


class Reporter:
    """The reporter of the ranks that say nothing; rank 0 has a ``MainReporter``."""

    def message(self, line: str) -> None:
        """Print one line for people."""

    def open_files(self, resume_step: int | None) -> None:
        """Open the run's logs: the run is accepted from here on.

        Args:
            resume_step: go on after this step, and forget what an interrupted run logged of later ones; None begins new logs.

        Raises:
            CheckpointError: a log to go on with is malformed.
            FileError: one cannot be written, or a new run would write over an old one.
        """

    def first_value(self, name: str, last_step: int) -> float | None:
        """Return the metric in the first line up to a step that has it; None where there is none."""

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log what was seen at a step, beside what ``step`` logs of it."""

    def evaluation_responses(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Write some responses of an evaluation for people to read."""

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
        groups: Sequence[RolloutGroup] = (),
        tickets: Tickets | None = None,
    ) -> None:
        """Log a step that is done, and show it.

        Args:
            step: steps done.
            metrics: by name.
            seconds: by phase.
            groups: that it trained on.
            tickets: which groups it used up, where groups outlive a step.
        """

    def close(self) -> None:
        """Close the logs and end the display."""


class MainReporter(Reporter):
    """Shows and logs a run, on rank 0: the display, metrics.jsonl and TensorBoard, readable responses, groups.jsonl.

    Args:
        config: the run.
        start_step: steps that were done before this process began.
    """

    def __init__(self, config: Config, start_step: int) -> None:
        self._config = config
        self._folder = config.run_dir
        self._closing = ExitStack()  # whatever fails to close, the rest is closed too
        progress = RunProgress(config.steps, start_step=start_step, enabled=config.observe.progress)
        self._progress = self._closing.enter_context(progress)
        self._metrics: MetricsWriter | None = None
        self._rollouts: RolloutWriter | None = None
        self._tickets: TicketsWriter | None = None

    def message(self, line: str) -> None:
        """Print one line, above the live display."""
        self._progress.message(line)

    def open_files(self, resume_step: int | None) -> None:
        """Open the logs in the run folder."""
        if resume_step is not None:
            for name in LOGS:
                read_log(self._folder / name, resume_step)  # all of them, before one is written over
        observe, rollout = self._config.observe, self._config.rollout
        self._metrics = MetricsWriter(self._folder, tensorboard=observe.tensorboard, resume_step=resume_step)
        self._closing.callback(self._metrics.close)
        if rollout.asynchronous is not None or rollout.partial is not None:
            self._tickets = TicketsWriter(self._folder, resume_step=resume_step)
            self._closing.callback(self._tickets.close)
        self._rollouts = RolloutWriter(self._folder, observe.rollouts_per_step)

    def first_value(self, name: str, last_step: int) -> float | None:
        """Look the metric up in metrics.jsonl."""
        return first_value(self._folder / "metrics.jsonl", name, last_step)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl."""
        assert self._metrics is not None
        self._metrics.write(step, metrics)

    def evaluation_responses(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Write a file of responses."""
        assert self._rollouts is not None
        self._rollouts.write(step, groups, kind="evaluation")

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
        groups: Sequence[RolloutGroup] = (),
        tickets: Tickets | None = None,
    ) -> None:
        """Write the step into every log, and show it."""
        assert self._metrics is not None and self._rollouts is not None
        self._metrics.write(step, metrics, seconds)
        self._rollouts.write(step, groups)
        if self._tickets is not None and tickets is not None:
            self._tickets.write(step, tickets.trained, tickets.dropped)
        self._progress.update(step, metrics, seconds)

    def close(self) -> None:
        """Close the logs and end the display."""
        self._closing.close()
