"""The asynchronous reinforcement learning loop: rank 0 generates in the background, from the first weights to the last step."""

from megarl.config.schema import Config
from megarl.loop.learning import Models, build_models, learn
from megarl.loop.run import Run


def run_asynchronous_rl(config: Config, resume: bool) -> None:
    """Train by RL with ``rollout.asynchronous``; every rank of the world runs this."""
    models = build_models(config)
    with Run(config, models.policy, models.algorithm, models.critic, resume=resume) as run:
        train_asynchronously(run, models)
        run.export()


def train_asynchronously(run: Run, models: Models) -> None:
    """Generate beside learning until the run, or its stage, is over."""
    run.rollout.push_weights(run.weight_version)  # fails at the start, not after an hour
    run.evaluate_if_due()
    run.rollout.resume(run.weight_version)  # from here on generation runs beside all that follows
    while not run.is_over:
        with run.timer.phase("wait"):
            collected = run.rollout.collect(run.step)
        learned = learn(run, models, collected)
        with run.timer.phase("sync"):
            run.rollout.pause()
            run.rollout.push_weights(run.weight_version + 1)
            run.rollout.resume(run.weight_version + 1)
        run.finish_step(learned.results, learned.collected, learned.outputs, learned.metrics, learned.critic_results)
