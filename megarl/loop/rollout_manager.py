"""Sampling and scoring as the loops see it: rank 0 does the work, every rank gets the batch."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config
from megarl.config.stages import Stage, stages_of
from megarl.config.tasks import task_scorers
from megarl.data.chat_template import chat_settings
from megarl.data.curriculum import LengthLimit, StagedPrompts
from megarl.data.packing import pack_groups
from megarl.data.sampler import PromptSource, build_evaluation_prompts, build_prompt_source
from megarl.data.template import ObservationTemplate
from megarl.data.tokenizer import find_end_tokens, response_decoder
from megarl.engines.build import build_engine
from megarl.environments.run import Environments, open_environments
from megarl.errors import CheckpointError
from megarl.loop.background import BackgroundLoop
from megarl.loop.broadcast import broadcast_batch, broadcast_value
from megarl.loop.start_checks import check_references, row_sizes
from megarl.loop.weight_sync import MainRankEngine, WeightSync, check_transport
from megarl.observe.metrics import accuracy_metrics, pass_at_k, pass_rates, rollout_metrics
from megarl.rewards.combine import RewardScorer
from megarl.rewards.correctness import correctness
from megarl.rewards.episodes import EpisodeScorer
from megarl.rollout.asynchronous_collector import AsynchronousCollector
from megarl.rollout.collect_result import CollectResult
from megarl.rollout.collector import Collector, Score
from megarl.rollout.episodes import EpisodePlayer
from megarl.rollout.partial_collector import PartialCollector
from megarl.rollout.pending_groups import Tickets
from megarl.train.roles import Learner, RewardModel
from megarl.types import PackedBatch, Prompt, RolloutGroup, ScoredRollout
from megarl.weights.checkpoint import DataState
from megarl.workers.sandbox import find_sandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The rollouts of one step.

    Attributes:
        packed: the batch, on every rank.
        groups: the same as people read it, on rank 0; empty elsewhere.
        metrics: what was seen while sampling and scoring, on rank 0.
        score_seconds: wall time in which nothing was generated, only scored or waited for environments.
        outlived_updates: whether responses may have been in flight while weights changed.
        tickets: which groups the step used up, on rank 0; None where responses do not outlive a step.
        reward_mean: over all responses that the step sampled, those of dropped groups included, on every rank.
    """

    packed: PackedBatch
    groups: tuple[RolloutGroup, ...]
    metrics: dict[str, float]
    score_seconds: float
    outlived_updates: bool
    tickets: Tickets | None
    reward_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is asked.

    Attributes:
        training: None for supervised runs.
        held_out: in the order of their evaluation.
        stages: those of the curriculum up to now, each of which is also evaluated by itself.
    """

    training: PromptSource | None
    held_out: list[Prompt]
    stages: Sequence[Stage] = ()


def read_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The prompts of a run without stages; raises DataError as ``build_prompt_source`` and ``check_references``."""
    training = build_prompt_source(config, tokenizer, row_sizes(config, tokenizer)) if config.kind == "rl" else None
    held_out = build_evaluation_prompts(config, tokenizer)
    check_references(config, training.rows() if training else ())
    return Prompts(training=training, held_out=held_out)


def prompts_of_stage(prompts: StagedPrompts, stages: Sequence[Stage], stage: Stage) -> Prompts:
    """The prompts of a stage."""
    return Prompts(training=prompts.source(stage), held_out=prompts.evaluation_prompts(stage), stages=stages[: stage.number + 1])


def read_held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The held-out prompts alone, with a curriculum those of all its stages."""
    check_references(config, ())
    if config.curriculum is None:
        return Prompts(training=None, held_out=build_evaluation_prompts(config, tokenizer))
    stages = stages_of(config)
    return Prompts(training=None, held_out=LengthLimit(config, stages, tokenizer).held_out_prompts(config), stages=stages)


def accuracy_name(stage: Stage) -> str:
    """The metric of the held-out prompts of a stage's lengths."""
    return f"accuracy@{stage.name}"


def add_model_rewards(collected: Collected, reward_model: RewardModel) -> Collected:
    """Add the reward model's scores to the rewards, for training and for people; every rank calls it."""
    scores = reward_model.rewards(collected.packed)
    packed = replace(collected.packed, rewards=collected.packed.rewards + reward_model.weight * scores)
    remaining = iter(scores.tolist())

    def scored(rollout: ScoredRollout) -> ScoredRollout:
        score = next(remaining)
        parts = {**rollout.parts, "reward_model": score}
        return replace(rollout, reward=rollout.reward + reward_model.weight * score, parts=parts)

    groups = tuple(replace(group, rollouts=tuple(map(scored, group.rollouts))) for group in collected.groups)
    metrics = collected.metrics | (rollout_metrics(groups) if groups else {})
    mean = float(packed.rewards.double().mean())
    return replace(collected, packed=packed, groups=groups, metrics=metrics, reward_mean=mean)


class MainRankRollouts:
    """Engine, collector, prompts, scorers and environments, on rank 0.

    Args:
        config: the run.
        tokenizer: of the policy.
        weight_shapes: of the policy's Hugging Face tensors, by name.
        warn: called with one line when something needs a person's eye.
        prompts: what is asked.
        with_greedy: also answer each training prompt greedily.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        weight_shapes: Mapping[str, tuple[int, ...]],
        warn: Callable[[str], None],
        prompts: Prompts,
        *,
        with_greedy: bool,
    ) -> None:
        self.config = config
        self.prompts = prompts.training
        self.evaluation_prompts = prompts.held_out
        self.stages = prompts.stages
        ends = find_end_tokens(config, tokenizer)
        for line in ends.notices:
            warn(line)
        decode = response_decoder(config, tokenizer, ends)
        warn(find_sandbox().describe())
        self.scorer = RewardScorer(config.rewards, task_scorers(config), decode)
        self.is_correct = correctness(config)
        self.engine = build_engine(config, config.run_dir, weight_shapes)

        score: Score = self.scorer.score
        self.environments: Environments | None = None
        player = None
        if (environment := config.rollout.environment) is not None:
            score = EpisodeScorer(score, weight=environment.weight, on_failure=config.rewards.on_failure).score
            self.environments = open_environments(environment)
            observations = ObservationTemplate(tokenizer, environment, chat_settings(config))
            prefill = observations.prefill if config.rollout.show_prefill else ""
            player = EpisodePlayer(self.environments, observations.encode, decode, environment.max_turns, prefill)
        self.collector = _collector_class(config)(
            self.engine,
            config,
            stop_token_ids=ends.stopping,
            decode=decode,
            score=score,
            warn=warn,
            with_greedy=with_greedy,
            player=player,
        )
        self.runner = asyncio.Runner() if config.rollout.asynchronous is None else BackgroundLoop()
        self.runner.run(self.scorer.check_workers())
        if self.environments is not None:
            self.runner.run(self.environments.check())
        self.runner.run(self.scorer.check_servers())
        self.runner.run(self.engine.start())

    def pass_rates(self, result: CollectResult) -> dict[str, float]:
        """``rollout/pass@k`` of all groups that a step sampled, those that dynamic sampling dropped among them."""
        config = self.config
        if not result.sampled:
            return {}
        rates = pass_rates(result.sampled, config.evaluation.pass_threshold, config.rollout.samples_per_prompt)
        return {f"rollout/{name}": value for name, value in rates.items()}

    def worker_metrics(self) -> dict[str, float]:
        """``rollout/replaced_workers``: of scorers and environments, that ended before they had answered, since the last step."""
        replaced = self.scorer.take_num_replaced() + (self.environments.take_num_replaced() if self.environments else 0)
        return {"rollout/replaced_workers": float(replaced)}

    def close(self) -> None:
        """End the engine, the scorers and the environments, and what is in flight."""
        if isinstance(self.collector, AsynchronousCollector):
            self.runner.run(self.collector.close())
        self.runner.run(self.engine.close())
        self.runner.run(self.scorer.close())
        if self.environments is not None:
            self.runner.run(self.environments.close())
        self.runner.close()


def _collector_class(config: Config) -> type[Collector]:
    if config.rollout.asynchronous is not None:
        return AsynchronousCollector
    return PartialCollector if config.rollout.partial is not None else Collector


class RolloutManager:
    """The collective face of MainRankRollouts: every rank calls every method."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        policy: Learner,
        warn: Callable[[str], None],
        prompts: Prompts | None,
        *,
        with_greedy: bool,
    ) -> None:
        """``prompts``: on rank 0."""
        check_transport(config)
        shapes = policy.weight_map.hugging_face_shapes()
        main = None if prompts is None else MainRankRollouts(config, tokenizer, shapes, warn, prompts, with_greedy=with_greedy)
        self._main = main
        self._outlives_updates = config.rollout.asynchronous is not None or config.rollout.partial is not None
        self._weight_sync = WeightSync(config, policy, MainRankEngine(main.engine, main.runner.run, warn) if main else None)

    def push_weights(self, version: int) -> None:
        """Give the policy's weights to the engine; afterwards every response reports ``version``."""
        self._weight_sync.push(version)

    def collect(self, step: int) -> Collected:
        """Sample and score the groups of one step."""
        main = self._main
        if main is None:
            return Collected(
                packed=broadcast_batch(None, PackedBatch),
                groups=(),
                metrics={},
                score_seconds=0.0,
                outlived_updates=self._outlives_updates,
                tickets=None,
                reward_mean=broadcast_value(None),
            )
        assert main.prompts is not None
        result = main.runner.run(main.collector.collect(main.prompts.take, step))
        main.runner.run(_record(main, result))
        rewards = [scored.reward for group in result.sampled for scored in group.rollouts]
        return Collected(
            packed=broadcast_batch(pack_groups(result.groups, main.is_correct), PackedBatch),
            groups=result.groups,
            metrics=rollout_metrics(result.groups)
            | main.pass_rates(result)
            | result.stats.metrics()
            | main.prompts.metrics()
            | main.worker_metrics(),
            score_seconds=max(0.0, result.stats.wall_seconds - result.stats.generating_seconds),
            outlived_updates=self._outlives_updates,
            tickets=result.tickets,
            reward_mean=broadcast_value(sum(rewards) / max(1, len(rewards))),
        )

    def pause(self) -> None:
        """Abort the requests of generation in the background, or wait for them, and send no others, before weights change."""
        if self._main is not None:
            collector = self._main.collector
            assert isinstance(collector, AsynchronousCollector)
            self._main.runner.run(collector.pause())

    def resume(self, version: int) -> None:
        """Generate in the background with the weights of ``version``, which the engine has."""
        if self._main is not None:
            collector, prompts = self._main.collector, self._main.prompts
            assert isinstance(collector, AsynchronousCollector) and prompts is not None
            self._main.runner.run(collector.resume(prompts.take, version))

    def evaluate(self) -> tuple[dict[str, float], tuple[RolloutGroup, ...]]:
        """Accuracy on the held-out prompts: metrics on every rank, groups on rank 0."""
        if self._main is None:
            return broadcast_value(None), ()
        main, evaluation = self._main, self._main.config.evaluation
        groups = main.runner.run(main.collector.evaluate(main.evaluation_prompts))
        metrics = accuracy_metrics(groups, evaluation.pass_threshold, evaluation.samples_per_prompt)
        for stage in main.stages:
            own = [group for group in groups if stage.above < len(group.prompt.token_ids) <= stage.max_prompt_tokens]
            if own:
                metrics[accuracy_name(stage)] = pass_at_k(own, 1, evaluation.pass_threshold)
        return broadcast_value(metrics), tuple(groups)

    def data_state(self) -> DataState:
        """Position in the training prompts, what is known of them, and the groups that wait or were begun; on rank 0."""
        if self._main is None or self._main.prompts is None:
            return DataState(position={}, pending=None)
        return self._main.runner.run(_data_state(self._main.prompts, self._main.collector))

    def restore_data(self, state: DataState) -> None:
        """Go on from there.

        Raises:
            CheckpointError: groups were begun that this run would lose, or the groups or prompts are others.
        """
        if self._main is None or self._main.prompts is None:
            return
        if state.pending is None:
            raise CheckpointError(
                "the checkpoint is of a run that sampled nothing to train on; resume with the interrupted run's kind"
            )
        self._main.prompts.restore(state.position)
        self._main.collector.restore(state.pending, self._main.prompts.prompt)

    def close(self) -> None:
        """End the engine and the scorers."""
        if self._main is not None:
            self._main.close()


async def _data_state(prompts: PromptSource, collector: Collector) -> DataState:
    """Both at the same moment, in which nothing is begun: without a wait in it, the event loop does nothing else meanwhile."""
    return DataState(position=prompts.state(), pending=collector.state())


async def _record(main: MainRankRollouts, result: CollectResult) -> None:
    """On the loop that takes prompts, which may be another thread's."""
    assert main.prompts is not None
    main.prompts.record(result.sampled, main.config.evaluation.pass_threshold)
