"""Prompts that are answered together: their slots at the engine, what is in flight, and what it took."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from megarl.errors import listed
from megarl.rollout.collect_result import CollectStats
from megarl.rollout.lock_step import LockStep
from megarl.rollout.requests import Request

PROMPTS_NAMED = 5


class Wave:
    """One round of prompts, or in asynchronous rollouts all of a run's.

    Args:
        num_slots: prompts that are at the engine at a time.
        stats: counts what the wave takes.

    Attributes:
        stats: the same; may be exchanged for others in between.
        slots: of the prompts at the engine.
        lock_step: of the prompts' episodes.
        in_flight: ids of the prompts that wait for answers, in the order they were sent.
        completed: set when a response has come or was scored.
        num_at_engine: requests that the engine has.
    """

    def __init__(self, num_slots: int, stats: CollectStats) -> None:
        self.stats = stats
        self.slots = asyncio.Semaphore(num_slots)
        self.lock_step = LockStep(num_slots)
        self.in_flight: dict[str, None] = {}
        self.completed = asyncio.Event()
        self.num_at_engine = 0
        self._generating_since = 0.0  # when the engine last had none before, by the monotonic clock

    @asynccontextmanager
    async def slot(self, request: Request) -> AsyncIterator[None]:
        """Wait for a slot, and hold it within the block."""
        self.lock_step.enqueue()
        try:
            await self.slots.acquire()
        except BaseException:
            self.lock_step.give_up()
            raise
        self.lock_step.admit(request.episodes)
        try:
            yield
        finally:
            self.slots.release()
            self.lock_step.leave(request.episodes)

    @contextmanager
    def at_engine(self) -> Iterator[None]:
        """Count a request that is at the engine within the block, and its seconds."""
        started = time.monotonic()
        if self.num_at_engine == 0:
            self._generating_since = started
        self.num_at_engine += 1
        try:
            yield
        finally:
            self.num_at_engine -= 1
            now = time.monotonic()
            if self.num_at_engine == 0:
                self.stats.generating_seconds += now - self._generating_since
            self.stats.generate_seconds += now - started

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
