"""Prompts to engine to scores to groups: one step's rollouts, or one evaluation."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain

from megarl.config.schema import Config
from megarl.engines.protocol import Generation, RolloutEngine, SamplingParams
from megarl.errors import CheckpointError, RolloutError
from megarl.rollout.collect_result import CollectResult, CollectStats
from megarl.rollout.episodes import EpisodePlayer
from megarl.rollout.lock_step import EpisodeKey
from megarl.rollout.pending_groups import LeftoverGroup, fill_step, groups_per_task
from megarl.rollout.requests import LIMIT_KEYS, Request, RequestFailed, RequestMaker, run_together
from megarl.rollout.saved_groups import PromptOf, Saved, load_group, refuse_damage, save_group
from megarl.rollout.wave import Wave
from megarl.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout

Score = Callable[[Rollout], Awaitable[ScoredRollout | None]]
Take = Callable[[int, Mapping[str, int]], Sequence[Prompt]]


class Collector:
    """Samples and scores responses to prompts, many at a time.

    What is returned does not depend on the order in which requests complete: a prompt's samples depend on the run's seed, the step
    and the prompt's position in the step. Requests are sent in the order of their prompts' token ids. A prompt's slot among
    ``rollout.concurrency`` is freed as soon as the engine has answered, so that slow scorers never decide what an engine decodes
    together.
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
        player: EpisodePlayer | None = None,
    ) -> None:
        """Give the collector all that it needs for the whole run.

        Args:
            engine: started; its weights are pushed by the caller.
            config: the run.
            stop_token_ids: all that end a response.
            decode: gives the text of a response without the tokens that end it.
            score: None for a response means that its whole group is dropped; in training another prompt takes its place.
            warn: called with one line when something needs a person's eye.
            with_greedy: whether ``collect`` also answers each prompt at temperature 0. Such a response is part of its group: it
                shares the group's request timeout and retries, and when it cannot be scored the group is dropped.
            player: plays each response as an episode; None where a response is one turn.
        """
        self._engine = engine
        self._config = config
        self._rollout = config.rollout
        self._decode = decode
        self._score_rollout = score
        self._warn = warn
        self._requests = RequestMaker(config, stop_token_ids, with_greedy=with_greedy)
        self._player = player
        self.leftover: list[LeftoverGroup] = []

    async def collect(self, take: Take, step: int) -> CollectResult:
        """Collect exactly ``rollout.prompts_per_step`` groups, asking ``take`` in waves for as many prompts as are missing.

        With dynamic sampling, groups whose rewards are all equal are dropped and replaced; what is sampled beyond the step's groups
        (``algorithm.over_sampling``) waits in ``leftover`` for the next steps, which take it first.

        Args:
            take: gives the next so many prompts, knowing how many groups of each task the step has.
            step: of the run; part of the seeds.

        Raises:
            RolloutError: the engine died, a prompt got no answer after all retries, or the waves did not suffice.
        """
        stats = CollectStats()
        num_groups, algorithm = self._rollout.prompts_per_step, self._config.algorithm
        per_task = groups_per_task(self._config)
        waiting = [one for one in self.leftover if step - one.step <= algorithm.max_surplus_age]
        stats.dropped_surplus = len(self.leftover) - len(waiting)
        sampled: list[RolloutGroup] = []
        filtered: list[RolloutGroup] = []
        position = 0
        while len(kept := fill_step(waiting, num_groups, per_task)) < num_groups:
            if stats.waves == algorithm.max_sampling_waves:
                raise RolloutError(_exhausted(stats, [one.group for one in kept], filtered, num_groups))
            num_prompts = math.ceil((num_groups - len(kept)) * algorithm.over_sampling)
            prompts = take(num_prompts, Counter(one.group.prompt.task for one in kept))
            requests = [self._requests.training(prompt, "train", step, number) for number, prompt in enumerate(prompts, position)]
            position += len(prompts)
            groups = await self._answer_together(requests, stats)
            sampled += groups
            for group in groups:
                if algorithm.dynamic_sampling and group.has_equal_rewards:
                    filtered.append(group)
                else:
                    waiting.append(LeftoverGroup(step=step, group=group))
            stats.dropped_filtered = len(filtered)
        self.leftover = [one for one in waiting if not any(one is other for other in kept)]
        stats.surplus, stats.reused = len(self.leftover), sum(one.step < step for one in kept)
        groups_of_step = tuple(one.group for one in kept)
        return CollectResult(groups=groups_of_step, filtered=tuple(filtered), sampled=tuple(sampled), stats=stats, tickets=None)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Sample and score every prompt as ``evaluation`` says.

        Groups on which a scorer failed are left out, with a warning that counts them.
        """
        stats = CollectStats()
        requests = [self._requests.evaluation(prompt, position) for position, prompt in enumerate(prompts)]
        groups = await self._answer_together(requests, stats)
        if stats.dropped_unscored:
            left_out = f"{stats.dropped_unscored} of {len(prompts)} evaluation prompts are left out"
            self._warn(f"{left_out}: a scorer or the environment failed on them")
        return groups

    async def pause(self) -> None:
        """Let no request be at the engine, for a weight update: nothing to do, for none outlives ``collect``."""

    async def resume(self, take: Take, version: int) -> None:
        """Let groups grow by the weights of ``version``, which the engine has: nothing to do, for ``collect`` begins them."""

    async def close(self) -> None:
        """End what is in flight: nothing."""

    def state(self) -> Saved:
        """Return the groups that wait for the next step as JSON values, for a checkpoint."""
        leftover = [{"step": one.step, "group": save_group(one.group)} for one in self.leftover]
        return {"surplus": leftover, "outstanding": None}

    def restore(self, state: Saved, prompt_of: PromptOf) -> None:
        """Go on from ``state()``; ``prompt_of`` gives the prompt of an id.

        Raises:
            CheckpointError: the groups are damaged, or of a run that began groups which this one would lose.
        """
        with refuse_damage():
            if state["outstanding"] is not None:
                raise CheckpointError(
                    "the checkpoint has groups that were begun and not yet trained on; resume with the rollout.asynchronous or "
                    "rollout.partial of the interrupted run"
                )
            self.leftover = [LeftoverGroup(step=one["step"], group=load_group(one["group"], prompt_of)) for one in state["surplus"]]

    async def _answer_together(self, requests: Sequence[Request], stats: CollectStats) -> list[RolloutGroup]:
        """Answer and score all prompts in one wave; the groups that were scored, in prompt order."""
        stats.waves += 1
        started = time.monotonic()
        wave = Wave(self._rollout.concurrency, stats)
        # prompts that begin with the same long document stand next to each other, so that the engine reads it once
        order = sorted(range(len(requests)), key=lambda index: requests[index].prompt.token_ids)
        try:
            with wave.watched(self._config.observe.stall_warning, self._warn):
                answers = await run_together(self._answer(requests[index], wave) for index in order)
        finally:
            stats.wall_seconds += time.monotonic() - started
        stats.dropped_unscored += answers.count(None)
        groups = dict(zip(order, answers, strict=True))
        return [group for _, group in sorted(groups.items()) if group is not None]

    async def _answer(self, request: Request, wave: Wave) -> RolloutGroup | None:
        """Take one prompt from request to group, with retries; None when a response could not be scored."""
        prompt, limit = request.prompt, self._rollout.time_limit(len(request.prompt.token_ids))
        for attempt in range(self._rollout.max_retries + 1):
            try:
                async with wave.slot(request):
                    deadline = asyncio.get_running_loop().time() + limit
                    wave.in_flight[prompt.prompt_id] = None
                    rollouts = await self._generate(request, deadline, wave)
                async with asyncio.timeout_at(deadline):
                    return await self._score(request, rollouts, wave)
            except TimeoutError:
                failure = f"prompt {prompt.prompt_id} was not answered and scored within {limit:g} s"
                cause: BaseException | None = None
            except RequestFailed as error:
                failure, cause = f"prompt {prompt.prompt_id} failed: {error.__cause__}", error.__cause__
            finally:
                wave.in_flight.pop(prompt.prompt_id, None)
            wave.stats.failures.append(failure)
            await self._engine.health()  # no retries against a dead engine: this raises
            if attempt < self._rollout.max_retries:
                wave.stats.retries += 1
                self._warn(f"{failure}; sending it again ({attempt + 1} of {self._rollout.max_retries} retries)")
        raise RolloutError(f"{failure}, after {self._rollout.max_retries} retries ({LIMIT_KEYS}, rollout.max_retries)") from cause

    async def _generate(self, request: Request, deadline: float, wave: Wave) -> list[Rollout]:
        """Ask at the same time for the samples and, behind them, the greedy response where one is wanted."""
        async with asyncio.timeout_at(deadline):
            if self._player is not None:
                return await self._play(self._player, request, wave)
            wanted = [request.samples] if request.greedy is None else [request.samples, request.greedy]
            token_ids = request.prompt.token_ids
            answers = await run_together(self._ask(token_ids, sampling, wave) for sampling in wanted)
        return self._rollouts(request, list(chain.from_iterable(answers)))

    def _rollouts(self, request: Request, generations: Sequence[Generation]) -> list[Rollout]:
        """Make rollouts of the request's responses of one turn, the greedy one last."""
        return [
            Rollout(
                prompt=request.prompt,
                sample_index=index,
                token_ids=generation.token_ids,
                from_policy=(True,) * len(generation.token_ids),
                logprobs=generation.logprobs,
                weight_versions=generation.weight_versions,
                finish_reason=generation.finish_reason,
                text=request.prompt.prefill + self._decode(generation.token_ids),
                routed_experts=generation.routed_experts,
            )
            for (index, _), generation in zip(request.responses, generations, strict=True)
        ]

    async def _play(self, player: EpisodePlayer, request: Request, wave: Wave) -> list[Rollout]:
        """Play the responses as episodes, each with requests of its own."""
        # The embedded engine decodes what it is asked for together; where servers batch, waiting for the slowest only costs.
        takes_turns_together = self._rollout.server is None

        async def play(episode: EpisodeKey, index: int, settings: SamplingParams) -> Rollout:
            async def generate(token_ids: tuple[int, ...], sampling: SamplingParams) -> Generation:
                if takes_turns_together:
                    await wave.lock_step.turn(episode)
                return (await self._ask(token_ids, sampling, wave))[0]

            try:
                return await player.play(request.prompt, index, settings, generate)
            finally:
                wave.lock_step.finish(episode)

        pairs = zip(request.episodes, request.responses, strict=True)
        return await run_together(play(episode, index, settings) for episode, (index, settings) in pairs)

    async def _ask(self, token_ids: tuple[int, ...], sampling: SamplingParams, wave: Wave) -> list[Generation]:
        """Send one request to the engine."""
        try:
            with wave.at_engine():
                generations = await self._engine.generate(token_ids, sampling)
        except RolloutError as error:
            raise RequestFailed from error
        if any(generation.finish_reason is FinishReason.ABORT for generation in generations):
            raise RequestFailed from RolloutError("the engine gave the request up")
        wave.completed.set()
        return generations

    async def _score(self, request: Request, rollouts: Sequence[Rollout], wave: Wave) -> RolloutGroup | None:
        """Score what ``_generate`` gave; None when one of the responses could not be scored."""

        async def score_one(rollout: Rollout) -> ScoredRollout | None:
            started = time.monotonic()
            environment_failure = rollout.environment_failure
            wave.stats.environment_failures += environment_failure is not None
            scored = await self._score_rollout(rollout)
            wave.stats.score_seconds += time.monotonic() - started
            if scored is not None:
                wave.stats.failures.extend(scored.failures)
            elif environment_failure is not None:
                wave.stats.failures.append(environment_failure)
            wave.completed.set()
            return scored

        scored = await run_together(score_one(rollout) for rollout in rollouts)
        complete = tuple(one for one in scored if one is not None)
        if len(complete) < len(scored):
            return None
        num_samples = request.samples.num_samples
        greedy = None if request.greedy is None else complete[num_samples]
        return RolloutGroup(prompt=request.prompt, rollouts=complete[:num_samples], greedy=greedy)


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
