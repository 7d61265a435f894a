"""Engine, collector, prompts, scorers and environments of a run, which rank 0 alone has."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from threading import Thread
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config
from megarl.config.tasks import task_scorers
from megarl.data.chat_template import chat_settings
from megarl.data.packing import pack_groups
from megarl.data.sampler import PromptSource
from megarl.data.template import ObservationTemplate
from megarl.data.tokenizer import find_end_tokens, response_decoder
from megarl.engines.build import build_engine
from megarl.environments.run import Environments, open_environments
from megarl.errors import CheckpointError
from megarl.loop.collected import Collected
from megarl.loop.prompts import Prompts, accuracy_name
from megarl.observe.rollout_metrics import accuracy_metrics, pass_at_k, pass_rates, rollout_metrics
from megarl.rewards.combine import EpisodeScorer, RewardScorer, correctness
from megarl.rollout.asynchronous_collector import AsynchronousCollector
from megarl.rollout.collect_result import CollectResult, CollectStats
from megarl.rollout.collector import Collector, Score
from megarl.rollout.episodes import EpisodePlayer
from megarl.rollout.partial_collector import PartialCollector
from megarl.types import RolloutGroup
from megarl.weights.checkpoint import DataState
from megarl.workers.sandbox import find_sandbox

T = TypeVar("T")

BACKGROUND_THREAD = "rollout"  # its name


class MainRankRollouts:
    """Engine, collector, prompts, scorers and environments, with an event loop of their own.

    Args:
        config: the run.
        tokenizer: of the policy.
        weight_shapes: of the policy's Hugging Face tensors, by name.
        warn: called with one line when something needs a person's eye.
        prompts: what is asked.
        with_greedy: also answer each training prompt greedily.

    Attributes:
        engine: started; what its weights are the caller decides.
        runner: runs coroutines of the engine; where generation runs beside training, on a thread of its own.
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
        self._config = config
        self._prompts = prompts.training
        self._held_out = prompts.held_out
        self._stages = prompts.stages
        ends = find_end_tokens(config, tokenizer)
        for line in ends.notices:
            warn(line)
        decode = response_decoder(config, tokenizer, ends)
        warn(find_sandbox().describe())
        self._scorer = RewardScorer(config.rewards, task_scorers(config), decode)
        self._is_correct = correctness(config)
        self.engine = build_engine(config, config.run_dir, weight_shapes)

        score: Score = self._scorer.score
        self._environments: Environments | None = None
        player = None
        if (environment := config.rollout.environment) is not None:
            score = EpisodeScorer(score, weight=environment.weight, on_failure=config.rewards.on_failure).score
            self._environments = open_environments(environment)
            observations = ObservationTemplate(tokenizer, environment, chat_settings(config))
            prefill = observations.prefill if config.rollout.show_prefill else ""
            player = EpisodePlayer(self._environments, observations.encode, decode, environment.max_turns, prefill)
        self._collector = _collector_class(config)(
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
        self.runner.run(self._scorer.check_workers())
        if self._environments is not None:
            self.runner.run(self._environments.check())
        self.runner.run(self._scorer.check_servers())
        self.runner.run(self.engine.start())

    def collect(self, step: int) -> Collected:
        """Sample and score the groups of one step."""
        assert self._prompts is not None
        result = self.runner.run(self._collect(self._prompts, step))
        rewards = [scored.reward for group in result.sampled for scored in group.rollouts]
        return Collected(
            packed=pack_groups(result.groups, self._is_correct),
            groups=result.groups,
            metrics=rollout_metrics(result.groups)
            | self._pass_rates(result)
            | result.stats.metrics()
            | self._prompts.metrics()
            | self._worker_metrics(),
            score_seconds=self._score_seconds(result.stats),
            tickets=result.tickets,
            reward_mean=sum(rewards) / max(1, len(rewards)),
        )

    def pause(self) -> None:
        """Let no request be at the engine; see RolloutManager."""
        self.runner.run(self._collector.pause())

    def resume(self, version: int) -> None:
        """Let generation go on; see RolloutManager."""
        assert self._prompts is not None
        self.runner.run(self._collector.resume(self._prompts.take, version))

    def evaluate(self) -> tuple[dict[str, float], tuple[RolloutGroup, ...]]:
        """Answer the held-out prompts, with accuracies of all of them and of each stage's own."""
        evaluation = self._config.evaluation
        groups = self.runner.run(self._collector.evaluate(self._held_out))
        metrics = accuracy_metrics(groups, evaluation.pass_threshold, evaluation.samples_per_prompt)
        for stage in self._stages:
            own = [group for group in groups if stage.above < len(group.prompt.token_ids) <= stage.max_prompt_tokens]
            if own:
                metrics[accuracy_name(stage)] = pass_at_k(own, 1, evaluation.pass_threshold)
        return metrics, tuple(groups)

    def data_state(self) -> DataState:
        """Return the position in the prompts, of which a run that only evaluates has none."""
        if self._prompts is None:
            return DataState(position={}, pending=None)
        return self.runner.run(self._data_state(self._prompts))

    def restore_data(self, state: DataState) -> None:
        """Go on from a position in the prompts; see RolloutManager."""
        if self._prompts is None:
            return
        if state.pending is None:
            raise CheckpointError(
                "the checkpoint is of a run that sampled nothing to train on; resume with the interrupted run's kind"
            )
        self._prompts.restore(state.position)
        self._collector.restore(state.pending, self._prompts.prompt)

    def close(self) -> None:
        """End the engine, the scorers and the environments, and what is in flight."""
        self.runner.run(self._collector.close())
        self.runner.run(self.engine.close())
        self.runner.run(self._scorer.close())
        if self._environments is not None:
            self.runner.run(self._environments.close())
        self.runner.close()

    async def _collect(self, prompts: PromptSource, step: int) -> CollectResult:
        """Collect and count on the loop that takes prompts, which may be another thread's."""
        result = await self._collector.collect(prompts.take, step)
        prompts.record(result.sampled, self._config.evaluation.pass_threshold)
        return result

    async def _data_state(self, prompts: PromptSource) -> DataState:
        """Take both at a moment in which nothing is begun: without a wait in it, the event loop does nothing else."""
        return DataState(position=prompts.state(), pending=self._collector.state())

    def _score_seconds(self, stats: CollectStats) -> float:
        """Return the wall time in which nothing was generated; 0 where generation beside training makes that meaningless."""
        return 0.0 if isinstance(self.runner, BackgroundLoop) else max(0.0, stats.wall_seconds - stats.generating_seconds)

    def _pass_rates(self, result: CollectResult) -> dict[str, float]:
        """``rollout/pass@k`` of all groups that a step sampled, those that dynamic sampling dropped among them."""
        config = self._config
        if not result.sampled:
            return {}
        rates = pass_rates(result.sampled, config.evaluation.pass_threshold, config.rollout.samples_per_prompt)
        return {f"rollout/{name}": value for name, value in rates.items()}

    def _worker_metrics(self) -> dict[str, float]:
        """``rollout/replaced_workers``: of scorers and environments, that ended before they had answered, since the last step."""
        replaced = self._scorer.take_num_replaced() + (self._environments.take_num_replaced() if self._environments else 0)
        return {"rollout/replaced_workers": float(replaced)}


def _collector_class(config: Config) -> type[Collector]:
    if config.rollout.asynchronous is not None:
        return AsynchronousCollector
    return PartialCollector if config.rollout.partial is not None else Collector


class BackgroundLoop:
    """An event loop in a thread of its own. It takes coroutines as asyncio.Runner does, and goes on between them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = Thread(target=self._serve, daemon=True, name=BACKGROUND_THREAD)
        self._thread.start()

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run it to its end while the calling thread waits; its exception is raised here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # when it was the wait that was interrupted
            raise

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # every thread begins with device 0
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
