"""What is in flight at the engine, told of when nothing moves."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megarl.errors import listed
from megarl.rollout.collect_result import CollectStats
from megarl.rollout.lock_step import LockStep

PROMPTS_NAMED = 5


@dataclass(slots=True)
class Progress:
    """What is going on now, for the stall warning, the time spent generating, and turns taken together.

    Attributes:
        lock_step: of the prompts' episodes.
        in_flight: ids of the prompts that wait for answers, in the order they were sent.
        completed: set when a response has come or was scored.
        at_engine: requests that the engine has.
        generating_since: when it last had none before, by the monotonic clock.
    """

    lock_step: LockStep
    in_flight: dict[str, None] = field(default_factory=dict)
    completed: asyncio.Event = field(default_factory=asyncio.Event)
    at_engine: int = 0
    generating_since: float = 0.0

    def engine_enter(self) -> None:
        """A request is sent."""
        if self.at_engine == 0:
            self.generating_since = time.monotonic()
        self.at_engine += 1

    def engine_exit(self, stats: CollectStats) -> None:
        """It was answered, or given up."""
        self.at_engine -= 1
        if self.at_engine == 0:
            stats.generating_seconds += time.monotonic() - self.generating_since

    @contextmanager
    def watched(self, seconds: float, warn: Callable[[str], None]) -> Iterator[None]:
        """Warn whenever nothing has completed for so many seconds."""
        watcher = asyncio.create_task(self._watch(seconds, warn))
        try:
            yield
        finally:
            watcher.cancel()

    async def _watch(self, seconds: float, warn: Callable[[str], None]) -> None:
        while True:
            self.completed.clear()
            try:
                await asyncio.wait_for(self.completed.wait(), seconds)
            except TimeoutError:
                names = listed(list(self.in_flight), PROMPTS_NAMED)
                warn(f"no response has come for {seconds:g} s; waiting for prompts {names or '(none)'}")
