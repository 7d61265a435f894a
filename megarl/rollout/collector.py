"""Prompts to engine to scores to groups: one step's rollouts, or one evaluation."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, TypeVar

from megarl.config.schema import Config
from megarl.errors import RolloutError, listed
from megarl.rollout.outstanding import Tickets
from megarl.rollout.protocol import Generation, RolloutEngine, SamplingParams
from megarl.types import GREEDY_INDEX, FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout

T = TypeVar("T")

PROMPTS_NAMED = 5

Score = Callable[[Rollout], Awaitable[ScoredRollout | None]]


@dataclass(slots=True, kw_only=True)
class CollectStats:
    """What collecting took.

    Attributes:
        wall_seconds: from the first request to the last score.
        generating_seconds: wall time with at least one request at the engine; the rest of ``wall_seconds`` only scored.
        generate_seconds: time at the engine, summed over prompts.
        score_seconds: time in scorers, summed over responses.
        waves: rounds of prompts.
        dropped_unscored: groups dropped because a scorer failed and rewards.on_failure is drop.
        dropped_filtered: groups dropped by dynamic sampling for equal rewards.
        retries: requests sent again.
        failures: one line for each failed request or scorer.
    """

    wall_seconds: float = 0.0
    generating_seconds: float = 0.0
    generate_seconds: float = 0.0
    score_seconds: float = 0.0
    waves: int = 0
    dropped_unscored: int = 0
    dropped_filtered: int = 0
    retries: int = 0
    failures: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """The numbers, by name for the log."""
        numbers = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "failures"}
        return {f"rollout/{name}": float(value) for name, value in numbers.items()} | {
            "rollout/failures": float(len(self.failures))
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectResult:
    """Groups in the order of their prompts, and what collecting them took; ``filtered`` are those of equal rewards.

    ``tickets`` names the groups where some outlive a step; None elsewhere.
    """

    groups: tuple[RolloutGroup, ...]
    filtered: tuple[RolloutGroup, ...]
    stats: CollectStats
    tickets: Tickets | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A prompt and how it is answered.

    Attributes:
        prompt: the prompt.
        samples: of the responses of its group.
        greedy: of the one greedy response beside them; None where none is wanted.
    """

    prompt: Prompt
    samples: SamplingParams
    greedy: SamplingParams | None


@dataclass(slots=True)
class _Progress:
    """What is going on now, for the stall warning and the time spent generating."""

    in_flight: dict[str, None] = field(default_factory=dict)  # prompt ids, in the order they were sent
    completed: asyncio.Event = field(default_factory=asyncio.Event)
    at_engine: int = 0
    generating_since: float = 0.0

    def engine_enter(self) -> None:
        if self.at_engine == 0:
            self.generating_since = time.monotonic()
        self.at_engine += 1

    def engine_exit(self, stats: CollectStats) -> None:
        self.at_engine -= 1
        if self.at_engine == 0:
            stats.generating_seconds += time.monotonic() - self.generating_since


class Collector:
    """Samples and scores responses to prompts, many at a time.

    What is returned does not depend on the order in which requests complete: a prompt's samples depend on the run's seed, the step
    and the prompt's position in the step. A prompt's place among ``rollout.concurrency`` is freed as soon as the engine
    has answered, so that slow scorers never decide what an engine decodes together.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        config: Config,
        *,
        stop_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        score: Score,
        warn: Callable[[str], None],
        with_greedy: bool,
    ) -> None:
        """Give the collector all that it needs for the whole run.

        Args:
            engine: started; its weights are pushed by the caller.
            config: the run.
            stop_token_ids: all that end a response.
            decode: gives the text of a response without special tokens.
            score: None for a response means that its whole group is dropped; in training another prompt takes its place.
            warn: called with one line when something needs a person's eye.
            with_greedy: whether ``collect`` also answers each prompt at temperature 0. Such a response is part of its group: it
                shares the group's request timeout and retries, and when it cannot be scored the group is dropped.
        """
        self._engine = engine
        self._config = config
        self._rollout = config.rollout
        self._stop_token_ids = tuple(stop_token_ids)
        self._decode = decode
        self._score_rollout = score
        self._warn = warn
        self._with_greedy = with_greedy

    async def collect(self, take: Callable[[int], Sequence[Prompt]], step: int) -> CollectResult:
        """Collect exactly ``rollout.prompts_per_step`` groups, asking ``take`` in waves for as many prompts as are missing.

        With dynamic sampling, groups whose rewards are all equal are dropped and replaced.

        Args:
            take: gives the next so many prompts.
            step: of the run; part of the seeds.

        Raises:
            RolloutError: the engine died, a prompt got no answer after all retries, or the waves did not suffice.
        """
        stats = CollectStats()
        kept: list[RolloutGroup] = []
        filtered: list[RolloutGroup] = []
        position = 0
        num_groups, algorithm = self._rollout.prompts_per_step, self._config.algorithm
        while len(kept) < num_groups:
            if stats.waves == algorithm.max_sampling_waves:
                raise RolloutError(_exhausted(stats, kept, filtered, num_groups))
            prompts = take(num_groups - len(kept))
            requests = [self._training_request(prompt, step, position + offset) for offset, prompt in enumerate(prompts)]
            position += len(prompts)
            for group in await self._wave(requests, stats):
                uninformative = algorithm.dynamic_sampling and group.has_equal_rewards
                (filtered if uninformative else kept).append(group)
            stats.dropped_filtered = len(filtered)
        return CollectResult(groups=tuple(kept), filtered=tuple(filtered), stats=stats, tickets=None)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Sample and score every prompt as ``evaluation`` says; seeds do not depend on the step, so that evaluations compare.

        Groups on which a scorer failed are left out, with a warning that counts them.
        """
        stats = CollectStats()
        settings = self._config.evaluation
        requests = []
        for position, prompt in enumerate(prompts):
            seed = self._seed_of("evaluate", 0, position)
            samples = self._sampling(settings.samples_per_prompt, settings.temperature, seed)
            requests.append(_Request(prompt=prompt, samples=samples, greedy=None))
        groups = await self._wave(requests, stats)
        if stats.dropped_unscored:
            self._warn(f"{stats.dropped_unscored} of {len(prompts)} evaluation prompts are left out: a scorer failed on them")
        return groups

    def _training_request(self, prompt: Prompt, step: int, position: int) -> _Request:
        seed = self._seed_of("train", step, position)
        return _Request(
            prompt=prompt,
            samples=self._sampling(self._rollout.samples_per_prompt, self._rollout.temperature, seed),
            greedy=self._sampling(1, 0.0, seed) if self._with_greedy else None,
        )

    async def _wave(self, requests: Sequence[_Request], stats: CollectStats) -> list[RolloutGroup]:
        """Answer and score all prompts at the same time; the groups that were scored, in prompt order."""
        stats.waves += 1
        started = time.monotonic()
        progress = _Progress()
        slots = asyncio.Semaphore(self._rollout.concurrency)
        watcher = asyncio.create_task(self._watch_for_stalls(progress))
        try:
            groups = await _all(self._answer(request, slots, progress, stats) for request in requests)
        finally:
            watcher.cancel()
            stats.wall_seconds += time.monotonic() - started
        stats.dropped_unscored += groups.count(None)
        return [group for group in groups if group is not None]

    async def _answer(
        self, request: _Request, slots: asyncio.Semaphore, progress: _Progress, stats: CollectStats
    ) -> RolloutGroup | None:
        """One prompt from request to group, with retries; None when a response could not be scored."""
        prompt = request.prompt
        for attempt in range(self._rollout.max_retries + 1):
            await slots.acquire()
            deadline = asyncio.get_running_loop().time() + self._rollout.request_timeout
            progress.in_flight[prompt.prompt_id] = None
            try:
                try:
                    generations = await self._generate(request, deadline, progress, stats)
                finally:
                    slots.release()
                async with asyncio.timeout_at(deadline):
                    return await self._score(request, generations, progress, stats)
            except TimeoutError:
                failure = f"prompt {prompt.prompt_id} was not answered and scored within {self._rollout.request_timeout:g} s"
                cause: BaseException | None = None
            except _RequestFailed as error:
                failure, cause = f"prompt {prompt.prompt_id} failed: {error.__cause__}", error.__cause__
            finally:
                progress.in_flight.pop(prompt.prompt_id, None)
            stats.failures.append(failure)
            await self._engine.health()  # no retries against a dead engine: this raises
            if attempt < self._rollout.max_retries:
                stats.retries += 1
                self._warn(f"{failure}; sending it again ({attempt + 1} of {self._rollout.max_retries} retries)")
        raise RolloutError(
            f"{failure}, after {self._rollout.max_retries} retries (rollout.request_timeout, rollout.max_retries)"
        ) from cause

    async def _generate(self, request: _Request, deadline: float, progress: _Progress, stats: CollectStats) -> list[Generation]:
        """The samples, and behind them the greedy response where one is wanted; asked for at the same time."""
        wanted = [request.samples] if request.greedy is None else [request.samples, request.greedy]
        started = time.monotonic()
        progress.engine_enter()
        try:
            async with asyncio.timeout_at(deadline):
                answers = await _all(self._engine.generate(request.prompt.token_ids, sampling) for sampling in wanted)
        except RolloutError as error:
            raise _RequestFailed from error
        finally:
            progress.engine_exit(stats)
            stats.generate_seconds += time.monotonic() - started
        generations = list(chain.from_iterable(answers))
        if any(generation.finish_reason is FinishReason.ABORT for generation in generations):
            raise _RequestFailed from RolloutError("the engine gave the request up")
        progress.completed.set()
        return generations

    async def _score(
        self, request: _Request, generations: Sequence[Generation], progress: _Progress, stats: CollectStats
    ) -> RolloutGroup | None:
        """The group of the generations that ``_generate`` gave; None when one of them could not be scored."""

        async def score_one(rollout: Rollout) -> ScoredRollout | None:
            started = time.monotonic()
            scored = await self._score_rollout(rollout)
            stats.score_seconds += time.monotonic() - started
            if scored is not None:
                stats.failures.extend(scored.failures)
            progress.completed.set()
            return scored

        num_samples = request.samples.num_samples
        rollouts = [
            Rollout(
                prompt=request.prompt,
                sample_index=index if index < num_samples else GREEDY_INDEX,
                token_ids=generation.token_ids,
                from_policy=(True,) * len(generation.token_ids),
                logprobs=generation.logprobs,
                weight_versions=generation.weight_versions,
                finish_reason=generation.finish_reason,
                text=self._decode(generation.token_ids),
            )
            for index, generation in enumerate(generations)
        ]
        scored = await _all(score_one(rollout) for rollout in rollouts)
        complete = tuple(one for one in scored if one is not None)
        if len(complete) < len(scored):
            return None
        greedy = None if request.greedy is None else complete[num_samples]
        return RolloutGroup(prompt=request.prompt, rollouts=complete[:num_samples], greedy=greedy)

    async def _watch_for_stalls(self, progress: _Progress) -> None:
        while True:
            progress.completed.clear()
            try:
                await asyncio.wait_for(progress.completed.wait(), self._config.observe.stall_warning)
            except TimeoutError:
                names = listed(list(progress.in_flight), PROMPTS_NAMED)
                self._warn(
                    f"no response has come for {self._config.observe.stall_warning:g} s; waiting for prompts {names or '(none)'}"
                )

    def _sampling(self, num_samples: int, temperature: float, seed: int) -> SamplingParams:
        return SamplingParams(
            num_samples=num_samples,
            max_new_tokens=self._rollout.max_new_tokens,
            temperature=temperature,
            top_p=self._rollout.top_p,
            top_k=self._rollout.top_k,
            stop_token_ids=self._stop_token_ids,
            seed=seed,
        )

    def _seed_of(self, purpose: str, step: int, position: int) -> int:
        """62 bits, stable across runs, machines and Python versions; engines may add a sample index within 63."""
        digest = hashlib.blake2b(f"{self._config.seed}/{purpose}/{step}/{position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 2


class _RequestFailed(Exception):
    """A request failed with its cause; told apart from errors of scorers, which are never retried."""


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at the same time; results in order. The first error cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
    return [task.result() for task in running]


def _exhausted(stats: CollectStats, kept: Sequence[RolloutGroup], filtered: Sequence[RolloutGroup], wanted: int) -> str:
    rewards = [scored.reward for group in (*kept, *filtered) for scored in group.rollouts]
    seen = (
        f"their rewards: min {min(rewards):g}, mean {sum(rewards) / len(rewards):g}, max {max(rewards):g}"
        if rewards
        else "none scored"
    )
    return (
        f"after {stats.waves} waves only {len(kept)} of {wanted} groups are kept ({len(filtered)} dropped as uninformative, "
        f"{stats.dropped_unscored} dropped for failed scorers; {seen}); use tasks that the model sometimes solves, "
        "or raise algorithm.max_sampling_waves"
    )
