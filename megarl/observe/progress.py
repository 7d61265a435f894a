"""The run as seen on the terminal: a live display, or one line for each step where there is no terminal."""

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

HEADLINES = ("reward_mean", "greedy_reward_mean", "loss", "response_length_mean", "entropy", "gradient_norm")


class RunProgress:
    """Shows step, time left, headline metrics and the phase times of the last step.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that were already done when this process began.
        enabled: observe.progress; when False only messages are printed.
        console: where to write.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._enabled = enabled
        self._console = console if console is not None else Console()
        self._clock = clock
        self._started = clock()
        self._accuracy: float | None = None
        self._display = _Display(self._console, total_steps, start_step) if enabled and self._console.is_terminal else None

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._display is not None:
            self._display.stop()

    def update(self, step: int, metrics: Mapping[str, float], phases: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done.

        Args:
            step: steps done.
            metrics: of the last step; ``HEADLINES`` and the newest ``accuracy`` are shown.
            phases: seconds by phase of the last step.
        """
        if not self._enabled:
            return
        self._accuracy = metrics.get("accuracy", self._accuracy)
        shown = headlines(metrics, self._accuracy)
        times = phase_times(phases)
        done = step - self._start_step
        left = (self._clock() - self._started) / done * (self._total_steps - step) if done > 0 else None
        eta = f"ETA {timedelta(seconds=round(left))}" if left is not None else "ETA -"
        if self._display is not None:
            self._display.show(step, eta, "  ".join(part for part in (shown, times) if part))
        else:
            self._print("  ".join(part for part in (f"step {step}/{self._total_steps}", shown, times, eta) if part))

    def message(self, line: str) -> None:
        """Print one line, above the live display; also when progress is off."""
        self._print(line)

    def _print(self, line: str) -> None:
        # soft_wrap: a log line stays one line. No markup: brackets in prompts and paths are text.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def headlines(metrics: Mapping[str, float], accuracy: float | None) -> str:
    """Show the few metrics worth a glance; the loss only where there is no reward (in RL its value says nothing)."""
    names = [name for name in HEADLINES if name in metrics and not (name == "loss" and "reward_mean" in metrics)]
    parts = [f"{name} {metrics[name]:.4g}" for name in names]
    if accuracy is not None:
        parts.insert(0, f"accuracy {accuracy:.1%}")
    return "  ".join(parts)


def phase_times(phases: Mapping[str, float]) -> str:
    """Seconds of the last step and of its phases, e.g. ``2.0 s (generate 1.5, update 0.5)``."""
    if not phases:
        return ""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    return f"{sum(phases.values()):.1f} s ({parts})"


class _Display(Progress):
    """A bar with the time left, and a line of text under it."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._status = ""
        super().__init__(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[eta]}"), console=console)
        self._task = self.add_task("run", total=total_steps, completed=start_step, eta="ETA -")

    def show(self, step: int, eta: str, status: str) -> None:
        self._status = status
        super().update(self._task, completed=step, eta=eta, refresh=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, then the status."""
        yield from super().get_renderables()
        yield Text(self._status, style="dim")
