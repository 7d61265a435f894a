"""Where the seconds of a step go."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up wall-clock seconds by phase; phases do not nest.

    Args:
        clock: monotonic seconds.
        on_phase: is told the name of each phase that begins, and ``other`` when it ends.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, on_phase: Callable[[str], None] = lambda name: None) -> None:
        self._clock = clock
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}
        self._active: str | None = None
        self._step_start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block as ``name``; several blocks of one name add up."""
        assert self._active is None, f"phase {name} inside phase {self._active}"
        assert name != "other", "other is what remains of a step"
        self._active = name
        self._on_phase(name)
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start
            self._active = None
        self._on_phase("other")

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count ``seconds`` of phase ``source`` as ``target``, for work that was measured inside the phase (scoring)."""
        assert 0 <= seconds <= self._seconds[source], f"{seconds} s of the {self._seconds[source]} s of {source}"
        self._seconds[source] -= seconds
        if seconds > 0:
            self._seconds[target] = self._seconds.get(target, 0.0) + seconds

    def step_breakdown(self) -> dict[str, float]:
        """Return the seconds by phase since the last call or construction, the rest as ``other``, and start the next step."""
        assert self._active is None, f"step ends inside phase {self._active}"
        now = self._clock()
        phases = self._seconds
        other = now - self._step_start - sum(phases.values())
        self._seconds, self._step_start = {}, now
        return {**phases, "other": other}
