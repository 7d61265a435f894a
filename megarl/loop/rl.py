"""The reinforcement learning loop: sample, learn, give the engine the new weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from transformers import PreTrainedTokenizerBase

from megarl.algorithms.off_policy import staleness_metrics
from megarl.algorithms.step_metrics import step_metrics
from megarl.config.schema import Config, ObserveConfig
from megarl.data.tokenizer import run_tokenizer
from megarl.loop.collected import add_model_rewards
from megarl.loop.evaluation import Measure, measure_responses
from megarl.loop.main_rank import on_main_rank
from megarl.loop.models import Models, build_models
from megarl.loop.open_run import RunParts, open_run
from megarl.loop.promotion import StageProgress
from megarl.loop.prompts import Prompts, read_prompts
from megarl.loop.rollout_manager import RolloutManager
from megarl.loop.run import Run
from megarl.metrics import CRITIC
from megarl.observe.reporter import Reporter
from megarl.observe.sentinels import Sentinels
from megarl.train.learner import share_results
from megarl.train.roles import compute_outputs


def run_rl(config: Config, resume: bool) -> None:
    """Train by RL; every rank of the world runs this."""
    models = build_models(config)
    with open_rl_run(config, models, partial(read_prompts, config), resume=resume) as parts:
        train(parts, models, config.observe)
        parts.checkpoints.export(parts.reporter.message)


def train(parts: RunParts[RolloutManager], models: Models, observe: ObserveConfig) -> None:
    """Sample and learn in turn until the run, or its stage, is over; ``rollout.asynchronous`` samples beside learning."""
    run, rollout, reporter = parts.run, parts.data, parts.reporter
    algorithm, policy, critic = models.algorithm, models.policy, models.critic
    sentinels = Sentinels(observe, reporter.message, reporter.first_value("entropy", run.step))
    rollout.push_weights(run.weight_version)  # fails at the start, not after an hour
    parts.evaluation.at_start()
    rollout.resume(run.weight_version)
    while not run.is_over:
        with run.timer.phase(rollout.phase):
            collected = rollout.collect(run.step)
        if models.reward_model is not None:
            with run.timer.phase("reward-model"):
                collected = add_model_rewards(collected, models.reward_model)
        with run.timer.phase("log-probs"):
            outputs = compute_outputs(policy, models.reference, critic, collected.packed)
        with run.timer.phase("pack"):
            prepared = algorithm.prepare(collected.packed, outputs, run.step)
        with run.timer.phase("update"):
            updates, critic_updates = [], []
            if run.step >= models.critic_warmup:
                with policy.on_device():
                    updates = [policy.update(batch, algorithm.objective) for batch in prepared.batches]
            if critic is not None:
                with critic.on_device():
                    critic_updates = [critic.update(batch, algorithm.value_objective) for batch in prepared.batches]
            results = share_results(policy, updates)
            critic_results = share_results(critic, critic_updates) if critic is not None else []
        metrics = step_metrics(results) | prepared.metrics
        if rollout.outlives_updates:
            metrics |= staleness_metrics(prepared.batches, run.weight_version)
        metrics |= {f"{CRITIC}{name}": value for name, value in step_metrics(critic_results).items()} | collected.metrics
        if any(not (result.skipped or result.empty) for result in results):
            algorithm.finish_step(collected.packed, outputs)
        with run.timer.phase("sync"):
            rollout.pause()
            rollout.push_weights(run.weight_version + 1)
            rollout.resume(run.weight_version + 1)
        run.timer.move(rollout.phase, "score", collected.score_seconds)
        metrics |= sentinels.check(collected.packed, outputs, version=run.weight_version, step=run.step + 1)
        run.advance()
        metrics |= parts.evaluation.after_step(collected.reward_mean)
        reporter.step(run.step, metrics, run.timer.step_breakdown(), collected.groups, collected.tickets)
        parts.checkpoints.save_if_due(rollout)


def open_rl_run(
    config: Config,
    models: Models,
    read: Callable[[PreTrainedTokenizerBase], Prompts],
    *,
    resume: bool,
    stage: StageProgress | None = None,
    is_carried: bool = False,
) -> AbstractContextManager[RunParts[RolloutManager]]:
    """Open a run that samples what it trains on; ``read`` gives its prompts on rank 0, the rest is as of ``open_run``."""

    def make_data(run: Run, reporter: Reporter, stack: ExitStack) -> tuple[RolloutManager, Measure | None]:
        tokenizer = run_tokenizer(config)
        prompts = on_main_rank(lambda: read(tokenizer))
        with_greedy = models.algorithm.needs_greedy_response
        rollout = RolloutManager(config, tokenizer, models.policy, reporter.message, prompts, with_greedy=with_greedy)
        stack.callback(rollout.close)
        measure = None if config.evaluation.data is None else partial(measure_responses, run, rollout, reporter)
        return rollout, measure

    learners, algorithm = models.learners(), models.algorithm
    return open_run(config, learners, make_data, algorithm=algorithm, resume=resume, stage=stage, is_carried=is_carried)
