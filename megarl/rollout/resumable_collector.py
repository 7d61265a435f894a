"""Groups whose responses are made in several requests, aborted and resumed, with weights that change in between."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from megarl.engines.protocol import SamplingParams, resumed
from megarl.errors import CheckpointError, RolloutError
from megarl.rollout.collect_result import CollectResult, CollectStats
from megarl.rollout.collector import Collector
from megarl.rollout.pending_groups import PendingGroup, PendingGroups, joined
from megarl.rollout.requests import LIMIT_KEYS, Request, RequestFailed, run_together
from megarl.rollout.saved_groups import PromptOf, Saved, refuse_damage
from megarl.rollout.wave import Wave
from megarl.types import FinishReason, Prompt, RolloutGroup


class ResumableCollector(Collector):
    """What asynchronous and partial rollouts have in common. A group's seeds depend on the run's seed and its ticket.

    The time limit (``rollout.request_timeout``) counts for each request of a group, from its start to its end or abort, and for the
    scoring.

    Attributes:
        pending: the groups begun and not yet trained on; a part of every checkpoint.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Take what Collector takes."""
        super().__init__(*arguments, **settings)
        self.pending = PendingGroups()
        self._is_cutting = False
        self._filtered: list[RolloutGroup] = []  # since the last step

    def state(self) -> Saved:
        """Return those groups as JSON values, for a checkpoint; on the event loop, where nothing else happens meanwhile."""
        return super().state() | {"outstanding": self.pending.state()}

    def restore(self, state: Saved, prompt_of: PromptOf) -> None:
        """Go on from ``state()``; groups that waited for a next step of other rollouts are given up.

        Raises:
            CheckpointError: the groups are damaged, or of another run.
        """
        with refuse_damage():
            if state["outstanding"] is not None:
                self.pending.restore(state["outstanding"], prompt_of)
        num_samples = self._requests.num_training_responses
        for group in self.pending.groups:
            if group.scored is None and len(group.samples) != num_samples:
                raise CheckpointError(
                    f"the checkpoint has groups of {len(group.samples)} responses that are under way, and this run's have "
                    f"{num_samples}; resume with the rollout.samples_per_prompt and the method of the interrupted run"
                )

    def _step_result(self, taken: Iterable[PendingGroup], stats: CollectStats) -> CollectResult:
        """Take these groups out of the store."""
        groups, tickets = self.pending.take(taken)
        filtered, self._filtered = tuple(self._filtered), []
        return CollectResult(groups=groups, filtered=filtered, sampled=groups + filtered, stats=stats, tickets=tickets)

    def _begin(self, prompt: Prompt, version: int) -> PendingGroup:
        return self.pending.begin(prompt, version, self._requests.num_training_responses)

    def _request(self, group: PendingGroup) -> Request:
        return self._requests.training(group.prompt, "ticket", 0, group.ticket)

    async def _extend(self, group: PendingGroup, budget: int, wave: Wave) -> None:
        """Let every unfinished response grow by up to ``budget`` tokens, or up to an abort; with retries.

        Raises:
            RolloutError: the engine died, or gave no answer after all retries.
        """
        retries, limit = self._rollout.max_retries, self._rollout.time_limit(len(group.prompt.token_ids))
        for attempt in range(retries + 1):
            await self._until_requests_may_be_sent(group.prompt)
            wave.in_flight[group.prompt.prompt_id] = None
            try:
                with wave.at_engine():
                    async with asyncio.timeout(limit):
                        await run_together(self._ask_for(group, *part) for part in self._parts(group, budget))
                wave.completed.set()
                return
            except TimeoutError:
                failure = f"prompt {group.prompt.prompt_id} was not answered within {limit:g} s"
                cause: BaseException | None = None
            except RequestFailed as error:
                failure, cause = f"prompt {group.prompt.prompt_id} failed: {error.__cause__}", error.__cause__
            finally:
                wave.in_flight.pop(group.prompt.prompt_id, None)
            wave.stats.failures.append(failure)
            await self._engine.health()  # no retries against a dead engine: this raises
            if attempt < retries:
                wave.stats.retries += 1
                self._warn(f"{failure}; sending it again ({attempt + 1} of {retries} retries)")
        raise RolloutError(f"{failure}, after {retries} retries ({LIMIT_KEYS}, rollout.max_retries)") from cause

    async def _until_requests_may_be_sent(self, prompt: Prompt) -> None:
        """Return at once: no weights change while groups are in flight."""

    def _parts(self, group: PendingGroup, budget: int) -> list[tuple[list[int], SamplingParams]]:
        """Return the requests for a group's unfinished responses, and which responses each is for.

        All samples of a new group are one request, so that the engine reads their prompt once.
        """
        request = self._request(group)
        num_samples = request.samples.num_samples
        untouched = [index for index in group.unfinished if not group.samples[index].token_ids and index < num_samples]
        requests = []
        if len(untouched) == num_samples:
            requests.append((untouched, request.samples))
        for index in group.unfinished:
            if index < num_samples and len(untouched) < num_samples:
                requests.append(([index], resumed(request.samples, index, len(group.samples[index].token_ids))))
            elif index == num_samples:
                assert request.greedy is not None
                requests.append(([index], resumed(request.greedy, 0, len(group.samples[index].token_ids))))
        return [(indices, replace(one, max_new_tokens=min(one.max_new_tokens, budget))) for indices, one in requests]

    async def _ask_for(self, group: PendingGroup, indices: list[int], sampling: SamplingParams) -> None:
        """One request; its answers are kept at once, so that a retry of the others loses none."""
        so_far = group.samples[indices[0]].token_ids
        try:
            answers = await self._engine.generate(group.prompt.token_ids + so_far, sampling)
        except RolloutError as error:
            raise RequestFailed from error
        if not self._is_cutting and any(answer.finish_reason is FinishReason.ABORT for answer in answers):
            raise RequestFailed from RolloutError("the engine gave the request up")
        for index, answer in zip(indices, answers, strict=True):
            group.samples[index] = joined(group.samples[index], answer, self._rollout.max_new_tokens)

    async def _finish(self, group: PendingGroup, wave: Wave) -> None:
        """Score a group of whole responses; it is dropped when that fails, or when dynamic sampling has no use for it."""
        limit, request = self._rollout.time_limit(len(group.prompt.token_ids)), self._request(group)
        try:
            async with asyncio.timeout(limit):
                scored = await self._score(request, self._rollouts(request, group.samples), wave)
        except TimeoutError:
            raise RolloutError(f"prompt {group.prompt.prompt_id} was not scored within {limit:g} s ({LIMIT_KEYS})") from None
        if scored is None:
            wave.stats.dropped_unscored += 1
            self.pending.drop(group)
        elif self._config.algorithm.dynamic_sampling and scored.has_equal_rewards:
            wave.stats.dropped_filtered += 1
            self._filtered.append(scored)
            self.pending.drop(group)
        else:
            group.scored, group.samples = scored, []
