"""Generation beside training: groups are begun ahead of their step, and live through weight updates."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from megarl.errors import RolloutError
from megarl.rollout.collect_result import CollectResult, CollectStats
from megarl.rollout.collector import Take
from megarl.rollout.pending_groups import PendingGroup, next_batch
from megarl.rollout.resumable_collector import ResumableCollector
from megarl.rollout.wave import Wave
from megarl.types import Prompt


class AsynchronousCollector(ResumableCollector):
    """Keeps groups in flight on the event loop's thread, whatever the thread that calls it does meanwhile.

    Groups pending and in training are at most ``rollout.asynchronous.max_staleness`` + 1 steps' groups: the bound of AReaL
    (arXiv 2505.24298, section 5.1) on groups begun. ``pending.next_batch`` says which are trained on next.

    A failure of any group ends the run at the next call.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Take what Collector takes."""
        super().__init__(*arguments, **settings)
        assert self._rollout.asynchronous is not None
        self._settings = self._rollout.asynchronous
        self._version = 0
        self._num_in_training = 0
        self._num_dropped = 0  # since the last batch
        self._take: Take | None = None
        self._wave = Wave(self._rollout.concurrency, CollectStats())
        self._may_send = False
        self._held: list[tuple[tuple[int, ...], asyncio.Future[None]]] = []  # token ids of prompts whose requests wait
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    async def resume(self, take: Take, version: int) -> None:
        """Let groups grow by the weights of ``version``, which the engine has, and begin as many as the bound allows."""
        self._version, self._take, self._num_in_training = version, take, 0
        self._may_send = True
        for _, held in sorted(self._held, key=lambda item: item[0]):  # as Collector sends them
            if not held.done():
                held.set_result(None)
        self._held.clear()
        if not self._tasks:  # at the start of the run: those that a checkpoint brought
            self._start([group for group in self.pending.groups if group.scored is None])
        self._fill()

    async def pause(self) -> None:
        """Let no request be at the engine, for a weight update: they are aborted, or waited for.

        Raises:
            MegaRLError: what went wrong with a group meanwhile.
        """
        self._may_send = False
        if self._settings.on_update == "continue":
            self._is_cutting = True
            try:
                await self._engine.abort()
                await self._until(lambda: self._wave.num_at_engine == 0)
            finally:
                self._is_cutting = False
        await self._until(lambda: self._wave.num_at_engine == 0)

    async def collect(self, take: Take, step: int) -> CollectResult:
        """Wait for the groups of the next step and take them out of the store.

        Raises:
            MegaRLError: what went wrong with a group since the last call.
        """
        started = asyncio.get_running_loop().time()
        with self._wave.watched(self._config.observe.stall_warning, self._warn):
            await self._until(lambda: self._next_batch() is not None)
        batch = self._next_batch()
        assert batch is not None
        stats, self._wave.stats = self._wave.stats, CollectStats()  # groups in flight go on counting in the new one
        stats.wall_seconds = asyncio.get_running_loop().time() - started
        self._num_in_training, self._num_dropped = len(batch), 0
        return self._step_result(batch, stats)

    async def close(self) -> None:
        """End all work; what was in flight is lost unless a checkpoint has it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _next_batch(self) -> list[PendingGroup] | None:
        return next_batch(self.pending.groups, self._version, self._settings.max_staleness, self._rollout.prompts_per_step)

    def _fill(self) -> None:
        """Begin as many groups as the bound allows, and none that the run's last step would leave over."""
        assert self._take is not None
        num_steps = min(self._settings.max_staleness + 1, self._config.steps - self._version)
        num_new = num_steps * self._rollout.prompts_per_step - len(self.pending.groups) - self._num_in_training
        self._start([self._begin(prompt, self._version) for _ in range(num_new) for prompt in self._take(1, {})])

    def _start(self, groups: Iterable[PendingGroup]) -> None:
        for group in sorted(groups, key=lambda group: group.prompt.token_ids):  # as Collector sends them
            task = asyncio.create_task(self._complete(group))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        self._failure = self._failure or error
        self._changed.set()

    async def _complete(self, group: PendingGroup) -> None:
        """One group from its prompt to its rewards, over weight updates."""
        async with self._wave.slots:
            while group.unfinished:
                try:
                    await self._extend(group, self._rollout.max_new_tokens, self._wave)
                finally:
                    self._changed.set()
        await self._finish(group, self._wave)
        if group.scored is None:
            self._num_dropped += 1
            self._check_dropped()
            self._fill()

    async def _until_requests_may_be_sent(self, prompt: Prompt) -> None:
        while not self._may_send:
            self._changed.set()  # a request that failed has left the engine
            held = asyncio.get_running_loop().create_future()
            self._held.append((prompt.token_ids, held))
            await held

    def _check_dropped(self) -> None:
        limit = self._config.algorithm.max_sampling_waves * self._rollout.prompts_per_step
        if self._num_dropped >= limit:
            raise RolloutError(
                f"{self._num_dropped} groups were dropped since the last step (for failed scorers or, with dynamic sampling, as "
                "uninformative); use tasks that the model sometimes solves, or raise algorithm.max_sampling_waves"
            )

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that the groups' tasks bring about, or raise what ended one of them."""
        while True:
            if self._failure is not None:
                raise self._failure
            if reached():
                return
            self._changed.clear()
            await self._changed.wait()
