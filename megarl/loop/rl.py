"""The reinforcement learning loop."""

from megarl.algorithms.algorithm import Algorithm
from megarl.config.schema import Config
from megarl.loop.rollout import add_model_rewards
from megarl.loop.run import Run
from megarl.train.roles import Critic, Policy, Reference, RewardModel, score, share_results


def run_rl(config: Config, resume: bool) -> None:
    """Train by RL; every rank of the world runs this."""
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    updates_per_step = config.algorithm.updates_per_step
    critic_warmup = config.critic.warmup_steps if config.critic else 0
    policy = Policy(config, total_updates=(config.steps - critic_warmup) * updates_per_step)
    reference = Reference(config) if config.algorithm.kl.place != "none" else None
    reward_model = RewardModel(config, config.reward_model) if config.reward_model is not None else None
    critic = Critic(config, total_updates=config.steps * updates_per_step) if config.algorithm.advantage == "gae" else None
    with Run(config, policy, algorithm, critic, resume=resume) as run:
        run.rollout.push_weights(run.weight_version)  # fails at the start, not after an hour
        run.evaluate_if_due()
        while run.step < config.steps:
            with run.timer.phase("generate"):
                collected = run.rollout.collect(run.step)
            if reward_model is not None:
                with run.timer.phase("reward-model"):
                    collected = add_model_rewards(collected, reward_model)
            with run.timer.phase("log-probs"):
                scores = score(policy, reference, critic, collected.packed)
            with run.timer.phase("pack"):
                prepared = algorithm.prepare(collected.packed, scores, run.step)
            with run.timer.phase("update"):
                learns = run.step >= critic_warmup
                updates = policy.update_each(prepared.batches if learns else (), algorithm.objective)
                critic_updates = critic.update_each(prepared.batches, algorithm.value_objective) if critic else []
                results = share_results(policy, updates)
                critic_results = share_results(critic, critic_updates) if critic else []
            algorithm.finish_step(collected.packed, scores)
            with run.timer.phase("sync"):
                run.rollout.push_weights(run.weight_version + 1)
            run.finish_step(results, collected, scores, prepared.metrics, critic_results)
        run.export()
