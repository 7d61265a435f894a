"""What every RL loop does with the rollouts of a step: the models, and one step of learning."""

from dataclasses import dataclass

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.off_policy import staleness_metrics
from megarl.config.models_of import has_reference
from megarl.config.schema import Config
from megarl.config.stages import PlannedUpdates, planned_updates
from megarl.loop.relayout import free_memory, move_learner
from megarl.loop.rollout_manager import Collected, add_model_rewards
from megarl.loop.run import Run
from megarl.train.roles import Critic, Learner, Policy, Reference, RewardModel, compute_outputs, share_results
from megarl.types import TokenOutputs, UpdateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The method and the models of a run; None for those that the method has no use for.

    Attributes:
        critic_warmup: first steps, in which the critic alone learns.
    """

    algorithm: Algorithm
    policy: Policy
    reference: Reference | None
    reward_model: RewardModel | None
    critic: Critic | None
    critic_warmup: int

    def learners(self) -> dict[str, Learner]:
        """Those that learn, by role."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a step learned from and how; ``critic_results`` is empty without a critic."""

    collected: Collected
    outputs: TokenOutputs
    metrics: dict[str, float]
    results: list[UpdateResult]
    critic_results: list[UpdateResult]


def build_models(config: Config, previous: dict[str, Learner] | None = None, planned: PlannedUpdates | None = None) -> Models:
    """Build them on every rank; weights of a resumed run are restored by Run.

    Args:
        config: the run, or its stage.
        previous: the learners of the stage before, by role, whose weights and optimizer states these take over. Each is taken out
            of here once it is moved, so that its memory is free before the next is built.
        planned: of all stages; of a run without stages its own.
    """
    previous = {} if previous is None else previous
    if previous:
        for learner in previous.values():
            learner.retire()
        free_memory()  # the frozen models of the stage before
    planned = planned or planned_updates(config)
    policy = Policy(config, total_updates=planned.policy, with_weights="policy" not in previous)
    _take_over(policy, "policy", previous, config)
    critic = None
    if config.algorithm.advantage == "gae":
        critic = Critic(config, total_updates=planned.critic, with_weights="critic" not in previous)
        _take_over(critic, "critic", previous, config)
    return Models(
        algorithm=Algorithm(config.algorithm, config.rollout.max_new_tokens),
        policy=policy,
        reference=Reference(config) if has_reference(config) else None,
        reward_model=RewardModel(config, config.reward_model) if config.reward_model is not None else None,
        critic=critic,
        critic_warmup=config.critic.warmup_steps if config.critic else 0,
    )


def _take_over(learner: Learner, role: str, previous: dict[str, Learner], config: Config) -> None:
    if role in previous:
        move_learner(previous.pop(role), learner, config)
        free_memory()


def learn(run: Run, models: Models, collected: Collected) -> Learned:
    """Score the step's rollouts, make advantages and update; every rank calls it."""
    algorithm, policy, critic = models.algorithm, models.policy, models.critic
    if models.reward_model is not None:
        with run.timer.phase("reward-model"):
            collected = add_model_rewards(collected, models.reward_model)
    with run.timer.phase("log-probs"):
        outputs = compute_outputs(policy, models.reference, critic, collected.packed)
    with run.timer.phase("pack"):
        prepared = algorithm.prepare(collected.packed, outputs, run.step)
    with run.timer.phase("update"):
        learns = run.step >= models.critic_warmup
        updates = policy.update_each(prepared.batches if learns else (), algorithm.objective)
        critic_updates = critic.update_each(prepared.batches, algorithm.value_objective) if critic else []
        results = share_results(policy, updates)
        critic_results = share_results(critic, critic_updates) if critic else []
    if any(not (result.skipped or result.empty) for result in results):
        algorithm.finish_step(collected.packed, outputs)
    metrics = prepared.metrics
    if collected.outlived_updates:
        metrics = metrics | staleness_metrics(prepared.batches, run.weight_version)
    return Learned(collected=collected, outputs=outputs, metrics=metrics, results=results, critic_results=critic_results)
