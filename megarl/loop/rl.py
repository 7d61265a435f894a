"""The reinforcement learning loop."""

from megarl.algorithms.batches import build_policy_batch
from megarl.algorithms.objectives import policy_objective
from megarl.config.schema import Config
from megarl.loop.run import Run
from megarl.train.roles import Policy, Reference, score


def run_rl(config: Config, resume: bool) -> None:
    """Train by RL; every rank of the world runs this."""
    policy = Policy(config, total_updates=config.steps * config.algorithm.updates_per_step)
    reference = Reference(config) if config.algorithm.kl.place == "loss" else None
    objective = policy_objective(config.algorithm)
    with Run(config, policy, resume=resume) as run:
        run.rollout.push_weights(policy, run.weight_version)  # fails at the start, not after an hour
        run.evaluate_if_due()
        while run.step < config.steps:
            with run.timer.phase("generate"):
                collected = run.rollout.collect(run.step)
            with run.timer.phase("log-probs"):
                scores = score(policy, reference, collected.packed)
            with run.timer.phase("pack"):
                batches = build_policy_batch(collected.packed, scores, config.algorithm)
            with run.timer.phase("update"):
                results = [policy.update(batch, objective) for batch in batches]
            with run.timer.phase("sync"):
                run.rollout.push_weights(policy, run.weight_version + 1)
            run.finish_step(results, collected, scores)
        run.export()
