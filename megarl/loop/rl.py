"""The reinforcement learning loop: generate, learn, give the engine the new weights."""

from megarl.config.schema import Config
from megarl.loop.learning import Models, build_models, learn
from megarl.loop.run import Run


def run_rl(config: Config, resume: bool) -> None:
    """Train by RL; every rank of the world runs this."""
    models = build_models(config)
    with Run(config, models.policy, models.algorithm, models.critic, resume=resume) as run:
        train(run, models)
        run.export()


def train(run: Run, models: Models) -> None:
    """Generate and learn in turn until the run, or its stage, is over."""
    run.rollout.push_weights(run.weight_version)  # fails at the start, not after an hour
    run.evaluate_if_due()
    while not run.is_over:
        with run.timer.phase("generate"):
            collected = run.rollout.collect(run.step)
        learned = learn(run, models, collected)
        with run.timer.phase("sync"):
            run.rollout.push_weights(run.weight_version + 1)
        run.finish_step(learned.results, learned.collected, learned.outputs, learned.metrics, learned.critic_results)
