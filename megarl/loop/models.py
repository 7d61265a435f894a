"""The method and the models of an RL run, and how models that learn go from one layout to another."""

import gc
from dataclasses import dataclass

import torch

from megarl.algorithms.algorithm import Algorithm
from megarl.config.schema import Config
from megarl.config.stages import PlannedUpdates, planned_updates
from megarl.reshard.megatron import OptimizerTransfer, TransferSettings, WeightTransfer
from megarl.train.learner import Learner
from megarl.train.roles import Critic, Policy, Reference, RewardModel


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
        """Return those that learn, by role."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})


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
    if config.has_critic:
        critic = Critic(config, total_updates=planned.critic, with_weights="critic" not in previous)
        _take_over(critic, "critic", previous, config)
    return Models(
        algorithm=Algorithm(config.algorithm, config.rollout.max_new_tokens),
        policy=policy,
        reference=Reference(config) if config.has_reference else None,
        reward_model=RewardModel(config, config.reward_model) if config.reward_model is not None else None,
        critic=critic,
        critic_warmup=config.critic.warmup_steps if config.critic else 0,
    )


def _take_over(learner: Learner, role: str, previous: dict[str, Learner], config: Config) -> None:
    if role in previous:
        move_learner(previous.pop(role), learner, config)
        free_memory()


def move_learner(source: Learner, destination: Learner, config: Config) -> None:
    """Make ``destination``, built without weights, the model that ``source`` is; collective over the world.

    Every parameter, moment and main parameter goes from a rank that holds it to those that need it, so the result is the same
    bit for bit as a checkpoint that is saved in one layout and loaded in the other.

    Args:
        source: may be retired; must not be used afterwards.
        destination: of the same model, in any layout over any ranks.
        config: its rollout.weight_transfer.bucket_mib bounds the memory of the transfer.

    Raises:
        TransferError: it failed on some rank.
    """
    settings = TransferSettings(
        bucket_bytes=config.rollout.weight_transfer.bucket_mib << 20,
        gpus_per_node=torch.cuda.device_count() or torch.distributed.get_world_size(),
        timeout_seconds=config.distributed_timeout,
    )
    with source.state_on_device(), destination.state_on_device():
        models = [(learner.engine.chunks, learner.engine.layout) for learner in (source, destination)]
        WeightTransfer(source.weight_map, models[0], models[1], settings).move()
        states = [(*model, one.megatron_optimizer) for model, one in zip(models, (source, destination), strict=True)]
        OptimizerTransfer(source.weight_map, states[0], states[1], settings).move()
    destination.go_on_from(source)


def free_memory() -> None:
    """Give back the memory of models that nothing names any more: megatron-core's hooks refer to them in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
