"""The reward of a response: the weighted sum of its scorers and the environment's part, what fails, and what counts as correct."""

import asyncio
import inspect
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megarl.builtin.scorers import BaseScorer, DocumentQAScorer, PythonScorer, RewardServerScorer, WorkerScorer
from megarl.builtin.scorers.document_qa import RuleScore
from megarl.config.schema import Config, RewardsConfig
from megarl.config.tasks import TRAIN, correct_scorers, tasks_of
from megarl.errors import ConfigError, RewardError, one_line
from megarl.rewards.hybrid import HybridScore, HybridScorer, verdict_name, verdict_reader
from megarl.rewards.process_pool import ScorerFailure, WorkerPool
from megarl.rewards.reward_server import RewardServer
from megarl.rewards.steps import split_steps, step_ends
from megarl.rewards.worker import checked_scores
from megarl.types import Rollout, ScoredRollout
from megarl.workers.on_loop import CallFailure, call_on_loop

AsyncScorer = Callable[[str | list[str], Mapping[str, Any]], Awaitable[object]]
Score = float | list[float]
Outcome = Score | HybridScore | ScorerFailure

logger = logging.getLogger(__name__)

PART = "environment"  # name of its part of the reward


@dataclass(frozen=True, slots=True, kw_only=True)
class _TaskScorer:
    """One scorer of a task; ``key`` is unique in the run: its name, behind its task's if the task has its own (``sums/exact``)."""

    key: str
    section: BaseScorer


class RewardScorer:
    """Scores responses; used from one event loop, closed at the end.

    Async functions and requests to reward servers and judges run on the event loop. All other scorers run in worker processes,
    where a regular expression or a comparison that never ends can be killed and does not hold the loop up.
    """

    def __init__(
        self,
        config: RewardsConfig,
        task_scorers: Mapping[str, Sequence[BaseScorer]],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Prepare all scorers.

        Args:
            config: its scorers are those of every task that has none of its own.
            task_scorers: the scorers of the other tasks, by the task's name.
            decode: gives the text of a run of response tokens, as ``Rollout.text`` was made behind the prompt's prefill.

        Raises:
            ConfigError: a scorer's pattern or function is wrong, or two of a task have one name.
        """
        self._config = config
        self._decode = decode
        self._default = _with_keys(config.scorers, prefix="")
        self._of_task = {task: _with_keys(scorers, prefix=f"{task}/") for task, scorers in task_scorers.items()}
        sections = {one.key: one.section for scorers in (self._default, *self._of_task.values()) for one in scorers}
        self._async_functions: dict[str, AsyncScorer] = {
            key: function
            for key, section in sections.items()
            if isinstance(section, PythonScorer) and _is_async(function := section.load())
        }
        self._servers = {
            key: RewardServer(section, key) for key, section in sections.items() if isinstance(section, RewardServerScorer)
        }
        judges = {key: section.judge for key, section in sections.items() if isinstance(section, DocumentQAScorer)}
        on_event_loop = self._async_functions.keys() | self._servers.keys()
        in_workers: dict[str, WorkerScorer] = {key: section for key, section in sections.items() if key not in on_event_loop}
        modules = [module for key in in_workers if (module := sections[key].user_module) is not None]
        in_workers |= {verdict_name(key): verdict_reader(judge) for key, judge in judges.items() if judge is not None}
        num_workers = min(config.concurrency, len(os.sched_getaffinity(0)))
        self._pool = WorkerPool(in_workers, num_workers, config.sandbox, modules)
        self._hybrids = {key: HybridScorer(key, judge, config.timeout, self._pool) for key, judge in judges.items()}
        self._responses = asyncio.Semaphore(config.concurrency)
        self._failure_counts: Counter[str] = Counter()

    @property
    def failure_counts(self) -> dict[str, int]:
        """Failures so far of each scorer that failed, by name."""
        return dict(self._failure_counts)

    def take_num_replaced(self) -> int:
        """Return how many workers ended before they had answered, and were replaced, since this was asked last."""
        return self._pool.take_num_replaced()

    async def check_workers(self) -> None:
        """Start a worker; raises RewardError when it cannot be started."""
        await self._pool.check()

    async def check_servers(self) -> None:
        """Let every reward server score something, and every judge judge something; raises RewardError when one cannot."""
        try:
            for server in self._servers.values():
                await server.check()
            for hybrid in self._hybrids.values():
                await hybrid.check()
        except RewardError:
            await self.close()
            raise

    async def score(self, rollout: Rollout) -> ScoredRollout | None:
        """Return the scored response; None when a scorer failed and ``on_failure`` is drop: leave its whole group out.

        Every failure is counted and logged. With ``on_failure: zero`` a failed scorer has no entry in ``parts``, adds 0 to the
        reward and is listed in ``failures``; where only the judge of document_qa failed, the rule's score remains.

        Raises:
            RewardError: a scorer failed and ``on_failure`` is stop, or no worker process can be started.
        """
        scorers = self._of_task.get(rollout.prompt.task, self._default)
        async with self._responses:
            outcomes = await self._run_all(scorers, rollout)
        parts: dict[str, float] = {}
        failures: list[str] = []
        step_rewards: dict[int, float] = {}
        for scorer, outcome in zip(scorers, outcomes, strict=True):
            failure = outcome.failure if isinstance(outcome, HybridScore) else outcome
            if isinstance(failure, ScorerFailure):
                self._failure_counts[scorer.key] += 1
                failures.append(f"{scorer.key} failed on {rollout.name}: {failure}")
            if isinstance(outcome, HybridScore):
                parts |= outcome.parts(scorer.section.log_name)
            elif isinstance(outcome, list):
                parts[scorer.section.log_name] = sum(outcome) / len(outcome) if outcome else 0.0
                for token, reward in self._at_tokens(scorer, outcome, rollout):
                    step_rewards[token] = step_rewards.get(token, 0.0) + scorer.section.weight * reward
            elif isinstance(outcome, float):
                parts[scorer.section.log_name] = outcome
        for line in failures:
            logger.warning("%s", line)
        if failures and self._config.on_failure == "stop":
            raise RewardError(f"scorer {failures[0]}; set rewards.on_failure to drop or zero to go on without it")
        if failures and self._config.on_failure == "drop":
            return None
        reward = sum(scorer.section.weight * parts.get(scorer.section.log_name, 0.0) for scorer in scorers)
        return ScoredRollout(
            rollout=rollout,
            reward=float(reward),
            parts=parts,
            step_rewards=tuple(sorted(step_rewards.items())),
            failures=tuple(failures),
        )

    async def close(self) -> None:
        """End the worker processes and the connections to reward servers and judges."""
        await self._pool.close()
        for hybrid in self._hybrids.values():
            await hybrid.close()
        for server in self._servers.values():
            await server.close()

    def _at_tokens(self, scorer: _TaskScorer, scores: Sequence[float], rollout: Rollout) -> Iterator[tuple[int, float]]:
        """Yield the scores of a response's steps with the index of the last token of each."""
        assert scorer.section.step_end is not None
        steps = split_steps(rollout.text, scorer.section.step_end)
        return zip(step_ends(steps, rollout.token_ids, self._decode, rollout.prompt.prefill), scores, strict=True)

    async def _run_all(self, scorers: Sequence[_TaskScorer], rollout: Rollout) -> list[Outcome]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(scorer, rollout)) for scorer in scorers]
        except ExceptionGroup as errors:  # no scorer's failure, those are outcomes: no worker could be started
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _run(self, scorer: _TaskScorer, rollout: Rollout) -> Outcome:
        name, reference, step_end = scorer.key, rollout.prompt.reference, scorer.section.step_end
        response = rollout.text if step_end is None else split_steps(rollout.text, step_end)
        try:
            if name in self._hybrids:
                return await self._hybrids[name].score(rollout)
            if name in self._async_functions:
                function = self._async_functions[name]
                return await self._limited(lambda: function(response, reference), response)
            if name in self._servers:
                server, token_ids = self._servers[name], rollout.prompt.token_ids + rollout.token_ids
                return await self._limited(lambda: server.score(token_ids), rollout.text)
            score = await self._pool.score(name, response, reference, self._config.timeout)
            return ScorerFailure("the worker answered with something else than a score") if isinstance(score, RuleScore) else score
        except ScorerFailure as failure:
            return failure

    async def _limited(self, scoring: Callable[[], Awaitable[object]], response: str | list[str]) -> Score:
        late = f"no score within rewards.timeout = {self._config.timeout:g} seconds"
        try:
            return checked_scores(await call_on_loop(scoring, self._config.timeout, late), response)
        except CallFailure as failure:
            raise ScorerFailure(str(failure)) from failure
        except ValueError as error:
            raise ScorerFailure(one_line(error)) from error


def _with_keys(scorers: Sequence[BaseScorer], prefix: str) -> list[_TaskScorer]:
    """Give each scorer its key; ``prefix`` tells apart scorers of different tasks. Raises ConfigError for one that is wrong."""
    names = Counter(scorer.log_name for scorer in scorers)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{names[repeated[0]]} scorers have the name '{repeated[0]}'; give each a name of its own")
    for scorer in scorers:
        for line in scorer.mistakes():
            raise ConfigError(f"scorer '{prefix}{scorer.log_name}': {line}")
    return [_TaskScorer(key=prefix + scorer.log_name, section=scorer) for scorer in scorers]


def _is_async(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class EpisodeScorer:
    """Adds an episode's reward to what the scorers give; an environment that failed is treated as a scorer that did.

    Args:
        score: the scorers.
        weight: factor of the episode's reward.
        on_failure: rewards.on_failure.
    """

    def __init__(self, score: Callable[[Rollout], Awaitable[ScoredRollout | None]], *, weight: float, on_failure: str) -> None:
        self._score = score
        self._weight = weight
        self._on_failure = on_failure

    async def score(self, rollout: Rollout) -> ScoredRollout | None:
        """Return the scored response; None when the environment or a scorer failed and ``on_failure`` is drop.

        With ``on_failure: zero`` an episode whose environment failed has no part of that name and adds 0, whatever rewards came
        before the failure.

        Raises:
            RewardError: the environment or a scorer failed and ``on_failure`` is stop.
        """
        episode = rollout.episode
        assert episode is not None
        line = rollout.environment_failure
        if line is not None:
            logger.warning("%s", line)
            if self._on_failure == "stop":
                raise RewardError(f"{line}; set rewards.on_failure to drop or zero to go on without it")
            if self._on_failure == "drop":
                return None
        scored = await self._score(rollout)
        if scored is None:
            return None
        if line is not None:
            return replace(scored, failures=(line, *scored.failures))
        parts = {**scored.parts, PART: episode.reward}
        return replace(scored, reward=scored.reward + self._weight * episode.reward, parts=parts)


def correctness(config: Config) -> Callable[[ScoredRollout], bool]:
    """Make the function that says whether a training response is correct: by the scores, not weighted, of the scorers that say so.

    They are those of ``config.tasks.correct_scorers``, of which the best counts; a failed scorer says 0. Where a task has none, as
    with an environment alone, the response's reward decides.
    """
    of_task = {task.name: correct_scorers(config, task) for task in tasks_of(config.data.train, TRAIN)}
    least = config.algorithm.reward_shaping.correct_reward

    def is_correct(scored: ScoredRollout) -> bool:
        names = of_task.get(scored.rollout.prompt.task, ())
        score = max(scored.parts.get(name, 0.0) for name in names) if names else scored.reward
        return score >= least

    return is_correct
