"""The reward of a response: the weighted sum of its scorers, and what happens when one of them fails."""

import asyncio
import inspect
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from megarl.config.schema import RewardsConfig
from megarl.errors import ConfigError, RewardError
from megarl.rewards.hybrid import HybridScore, HybridScorer, verdict_specs
from megarl.rewards.process_pool import ScorerFailure, WorkerPool
from megarl.rewards.scorers import ScorerSpec, compile_pattern, import_function, one_line
from megarl.rewards.worker import checked_score
from megarl.types import Rollout, ScoredRollout

AsyncScorer = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
Outcome = float | HybridScore | ScorerFailure

logger = logging.getLogger(__name__)


class RewardScorer:
    """Scores responses; used from one event loop, closed at the end.

    Async functions run on the event loop. All other scorers run in worker processes, where a regular expression or a
    comparison that never ends can be killed and does not hold the loop up.
    """

    def __init__(self, config: RewardsConfig) -> None:
        """Raises ConfigError when a scorer's pattern or function is wrong or two have one name."""
        self._config = config
        self._specs = [
            ScorerSpec(
                name=scorer.name or scorer.type,
                type=scorer.type,
                pattern=scorer.pattern,
                function=scorer.function,
                extract=scorer.extract,
                match=tuple(scorer.match),
            )
            for scorer in config.scorers
        ]
        names = Counter(spec.name for spec in self._specs)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ConfigError(f"{names[repeated[0]]} scorers have the name '{repeated[0]}'; give each a name of its own")
        self._async_functions: dict[str, AsyncScorer] = {}
        for spec in self._specs:
            compile_pattern(spec)
            if spec.type == "python" and _is_async(function := import_function(spec)):
                self._async_functions[spec.name] = function
        judges = {
            spec.name: scorer.judge for spec, scorer in zip(self._specs, config.scorers, strict=True) if spec.type == "document_qa"
        }
        in_workers = [spec for spec in self._specs if spec.name not in self._async_functions]
        num_workers = min(config.concurrency, len(os.sched_getaffinity(0)))
        self._pool = WorkerPool([*in_workers, *verdict_specs(judges)], num_workers)
        self._hybrids = {name: HybridScorer(name, judge, config.timeout, self._pool) for name, judge in judges.items()}
        self._responses = asyncio.Semaphore(config.concurrency)
        self._failure_counts: Counter[str] = Counter()

    @property
    def failure_counts(self) -> dict[str, int]:
        """Failures so far of each scorer that failed, by name."""
        return dict(self._failure_counts)

    async def start(self) -> None:
        """Make sure that every judge answers; needed before ``score`` where there is one.

        Raises:
            RewardError: one does not.
        """
        try:
            for hybrid in self._hybrids.values():
                await hybrid.start()
        except RewardError:
            await self.close()
            raise

    async def score(self, rollout: Rollout) -> ScoredRollout | None:
        """The scored response; None when a scorer failed and ``on_failure`` is drop: leave its whole group out.

        Every failure is counted and logged. With ``on_failure: zero`` a failed scorer has no entry in ``parts``, adds 0 to the
        reward and is listed in ``failures``; where only the judge of document_qa failed, the rule's score remains.

        Raises:
            RewardError: a scorer failed and ``on_failure`` is stop, or no worker process can be started.
        """
        async with self._responses:
            outcomes = await self._run_all(rollout)
        parts: dict[str, float] = {}
        failures: list[str] = []
        for spec, outcome in zip(self._specs, outcomes, strict=True):
            if isinstance(outcome, float):
                parts[spec.name] = outcome
            elif isinstance(outcome, HybridScore):
                parts |= outcome.parts(spec.name)
            failure = outcome.failure if isinstance(outcome, HybridScore) else outcome
            if isinstance(failure, ScorerFailure):
                self._failure_counts[spec.name] += 1
                failures.append(f"{spec.name} failed on {rollout.name}: {failure}")
        for line in failures:
            logger.warning("%s", line)
        if failures and self._config.on_failure == "stop":
            raise RewardError(f"scorer {failures[0]}; set rewards.on_failure to drop or zero to go on without it")
        if failures and self._config.on_failure == "drop":
            return None
        reward = sum(
            scorer.weight * parts.get(spec.name, 0.0) for scorer, spec in zip(self._config.scorers, self._specs, strict=True)
        )
        return ScoredRollout(rollout=rollout, reward=float(reward), parts=parts, step_rewards=(), failures=tuple(failures))

    async def close(self) -> None:
        """End the worker processes and the connections to judges."""
        for hybrid in self._hybrids.values():
            await hybrid.close()
        await self._pool.close()

    async def _run_all(self, rollout: Rollout) -> list[Outcome]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(spec.name, rollout)) for spec in self._specs]
        except ExceptionGroup as errors:  # no scorer's failure, those are outcomes: no worker could be started
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _run(self, name: str, rollout: Rollout) -> Outcome:
        reference = rollout.prompt.reference
        try:
            if name in self._hybrids:
                return await self._hybrids[name].score(rollout)
            if name in self._async_functions:
                return await self._run_async(self._async_functions[name], rollout.text, reference)
            return await self._pool.score(name, rollout.text, reference, self._config.timeout)
        except ScorerFailure as failure:
            return failure

    async def _run_async(self, function: AsyncScorer, response: str, reference: Mapping[str, Any]) -> float:
        deadline = asyncio.timeout(self._config.timeout)
        try:
            async with deadline:
                return checked_score(await function(response, reference))
        except Exception as error:  # a failure of the user's code, whatever it is
            late = f"no score within rewards.timeout = {self._config.timeout:g} seconds"
            raise ScorerFailure(late if deadline.expired() else one_line(error)) from error


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
