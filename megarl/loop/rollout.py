"""Sampling and scoring as the loops see it: rank 0 does the work, every rank gets the batch."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config
from megarl.data.packing import pack_groups
from megarl.data.sampler import PromptSource, build_evaluation_prompts, build_prompt_source
from megarl.loop.broadcast import broadcast_batch, broadcast_metrics
from megarl.loop.weight_sync import MainRankEngine, WeightSync
from megarl.observe.metrics import pass_at_k, rollout_metrics
from megarl.rewards.combine import RewardScorer
from megarl.rollout.build import build_engine
from megarl.rollout.collector import Collector
from megarl.train.roles import Policy, RewardModel, is_main_rank
from megarl.types import PackedBatch, RolloutGroup, ScoredRollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The rollouts of one step.

    Attributes:
        packed: the batch, on every rank.
        groups: the same as people read it, on rank 0; empty elsewhere.
        metrics: what was seen while sampling and scoring, on rank 0.
        score_seconds: wall time in which nothing was generated any more, only scored.
    """

    packed: PackedBatch
    groups: tuple[RolloutGroup, ...]
    metrics: dict[str, float]
    score_seconds: float


def add_model_rewards(collected: Collected, reward_model: RewardModel) -> Collected:
    """Add the reward model's scores to the rewards, for training and for people; every rank calls it."""
    scores = reward_model.score(collected.packed)
    packed = replace(collected.packed, rewards=collected.packed.rewards + reward_model.weight * scores)
    remaining = iter(scores.tolist())

    def scored(rollout: ScoredRollout) -> ScoredRollout:
        score = next(remaining)
        parts = {**rollout.parts, "reward_model": score}
        return replace(rollout, reward=rollout.reward + reward_model.weight * score, parts=parts)

    groups = tuple(replace(group, rollouts=tuple(map(scored, group.rollouts))) for group in collected.groups)
    metrics = collected.metrics | (rollout_metrics(groups) if groups else {})
    return replace(collected, packed=packed, groups=groups, metrics=metrics)


class MainRankRollout:
    """Engine, collector, prompts and scorers, on rank 0.

    Args:
        config: the run.
        tokenizer: of the policy.
        weight_shapes: of the policy's Hugging Face tensors, by name.
        warn: called with one line when something needs a person's eye.
        with_greedy: also answer each training prompt greedily.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        weight_shapes: Mapping[str, tuple[int, ...]],
        warn: Callable[[str], None],
        *,
        with_greedy: bool,
    ) -> None:
        self.config = config
        self.prompts: PromptSource | None = build_prompt_source(config, tokenizer) if config.kind == "rl" else None
        self.evaluation_prompts = build_evaluation_prompts(config, tokenizer)
        self.scorer = RewardScorer(config.rewards)
        self.engine = build_engine(config, config.run_dir, weight_shapes)
        stop_token_ids = {*config.rollout.stop_token_ids, tokenizer.eos_token_id}
        self.collector = Collector(
            self.engine,
            config,
            stop_token_ids=tuple(sorted(stop_token_ids)),
            decode=lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True),
            score=self.scorer.score,
            warn=warn,
            with_greedy=with_greedy,
        )
        self.runner = asyncio.Runner()
        self.runner.run(self.scorer.start())  # before the engine, whose start takes minutes
        self.runner.run(self.engine.start())

    def close(self) -> None:
        """End the engine and the scorers."""
        self.runner.run(self.engine.close())
        self.runner.run(self.scorer.close())
        self.runner.close()


class Rollout:
    """The collective face of MainRankRollout: every rank calls every method."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy,
        warn: Callable[[str], None],
        *,
        with_greedy: bool,
    ) -> None:
        shapes = policy.weight_map.hugging_face_shapes()
        main = MainRankRollout(config, tokenizer, shapes, warn, with_greedy=with_greedy) if is_main_rank() else None
        self._main = main
        self._weight_sync = WeightSync(config, policy, MainRankEngine(main.engine, main.runner.run, warn) if main else None)

    def push_weights(self, version: int) -> None:
        """Give the policy's weights to the engine; afterwards every response reports ``version``."""
        self._weight_sync.push(version)

    def collect(self, step: int) -> Collected:
        """Sample and score the groups of one step."""
        if self._main is None:
            return Collected(packed=broadcast_batch(None, PackedBatch), groups=(), metrics={}, score_seconds=0.0)
        main = self._main
        assert main.prompts is not None
        result = main.runner.run(main.collector.collect(main.prompts.take, step))
        packed = broadcast_batch(pack_groups(result.groups), PackedBatch)
        metrics = rollout_metrics(result.groups) | result.stats.metrics()
        score_seconds = result.stats.wall_seconds - result.stats.generating_seconds
        return Collected(packed=packed, groups=result.groups, metrics=metrics, score_seconds=score_seconds)

    def evaluate(self) -> tuple[dict[str, float], tuple[RolloutGroup, ...]]:
        """Accuracy on the held-out prompts: metrics on every rank, groups on rank 0."""
        if self._main is None:
            return broadcast_metrics(None), ()
        main, evaluation = self._main, self._main.config.evaluation
        groups = main.runner.run(main.collector.evaluate(main.evaluation_prompts))
        metrics = {"accuracy": pass_at_k(groups, 1, evaluation.pass_threshold)}
        if evaluation.samples_per_prompt > 1:
            k = evaluation.samples_per_prompt
            metrics[f"pass@{k}"] = pass_at_k(groups, k, evaluation.pass_threshold)
        return broadcast_metrics(metrics), tuple(groups)

    def data_state(self) -> dict[str, Any]:
        """Position in the training prompts, on rank 0."""
        return {} if self._main is None or self._main.prompts is None else self._main.prompts.state()

    def restore_data(self, state: dict[str, Any]) -> None:
        """Go on from that position."""
        if self._main is not None and self._main.prompts is not None:
            self._main.prompts.restore(state)

    def close(self) -> None:
        """End the engine and the scorers."""
        if self._main is not None:
            self._main.close()
