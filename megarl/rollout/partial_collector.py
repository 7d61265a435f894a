"""Partial rollouts (Kimi k1.5, arXiv 2501.12599, section 2.6.2): no response grows by more than a budget in one step."""

import asyncio

from megarl.errors import RolloutError
from megarl.rollout.collect_result import CollectResult, CollectStats
from megarl.rollout.collector import Take
from megarl.rollout.pending_groups import PendingGroup
from megarl.rollout.requests import run_together
from megarl.rollout.resumable_collector import ResumableCollector
from megarl.rollout.wave import Wave


class PartialCollector(ResumableCollector):
    """Collects whole groups; those with responses that reached ``rollout.partial.step_token_budget`` wait for the next step.

    A step goes on with all groups that wait and begins as many as it lacks whole ones; for those that it still lacks it begins
    others. Only when so many wait as steps are needed for the longest response, times the groups of a step, do the oldest go on for
    another budget in the same step: this fills the store at the start of a run, and bounds it.
    """

    async def collect(self, take: Take, step: int) -> CollectResult:
        """Exactly ``rollout.prompts_per_step`` whole groups, the oldest.

        Raises:
            RolloutError: as Collector's.
        """
        stats, size = CollectStats(), self._rollout.prompts_per_step
        while (missing := size - len(self._whole)) > 0 or stats.waves == 0:
            self._check_waves(stats)
            waiting = [group for group in self.pending.groups if group.scored is None]
            if stats.waves == 0:
                groups, num_new = waiting, missing
            elif len(waiting) >= self._num_segments * size:
                groups, num_new = waiting[:missing], 0
            else:
                groups, num_new = [], missing
            if num_new > 0:
                groups = groups + [self._begin(prompt, step) for prompt in take(num_new, {})]
            await self._grow_together(groups, stats)
        return self._step_result(self._whole[:size], stats)

    @property
    def _budget(self) -> int:
        assert self._rollout.partial is not None
        return self._rollout.partial.step_token_budget

    @property
    def _num_segments(self) -> int:
        """Steps of the longest response."""
        return -(-self._rollout.max_new_tokens // self._budget)

    @property
    def _whole(self) -> list[PendingGroup]:
        return [group for group in self.pending.groups if group.scored is not None]

    def _check_waves(self, stats: CollectStats) -> None:
        """Only dropped groups could make a step's waves endless."""
        settings, size = self._config.algorithm, self._rollout.prompts_per_step
        num_dropped = stats.dropped_filtered + stats.dropped_unscored
        if num_dropped >= settings.max_sampling_waves * size:
            raise RolloutError(
                f"{num_dropped} groups of one step are dropped ({stats.dropped_filtered} as uninformative, "
                f"{stats.dropped_unscored} for failed scorers) and only {len(self._whole)} of {size} are kept; use tasks that the "
                "model sometimes solves, or raise algorithm.max_sampling_waves"
            )

    async def _grow_together(self, groups: list[PendingGroup], stats: CollectStats) -> None:
        """Let all these groups grow by the budget at the same time, and score those that are whole."""
        stats.waves += 1
        started = asyncio.get_running_loop().time()
        wave = Wave(self._rollout.concurrency, stats)
        by_document = sorted(groups, key=lambda group: group.prompt.token_ids)  # as Collector sends them
        try:
            with wave.watched(self._config.observe.stall_warning, self._warn):
                await run_together(self._grow(group, wave) for group in by_document)
        finally:
            stats.wall_seconds += asyncio.get_running_loop().time() - started

    async def _grow(self, group: PendingGroup, wave: Wave) -> None:
        async with wave.slots:
            await self._extend(group, self._budget, wave)
        if not group.unfinished:
            await self._finish(group, wave)
