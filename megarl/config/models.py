"""The models that a run builds, each with all that was left to the policy's settings filled in."""

from dataclasses import dataclass
from pathlib import Path

from megarl.config.schema import (
    Config,
    CriticConfig,
    OptimizerConfig,
    ReferenceConfig,
    RewardModelConfig,
    RoleConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOfRun:
    """One model of a run.

    Attributes:
        name: its section in the config.
        role: its ranks and its layout.
        path: its folder.
        path_key: the key that gives the folder.
        is_random: its weights are drawn, not read.
        gives_values: a number for each token, not log-probs.
        optimizer: None for a frozen model.
    """

    name: str
    role: RoleConfig
    path: Path
    path_key: str
    is_random: bool
    gives_values: bool
    optimizer: OptimizerConfig | None

    @property
    def learns(self) -> bool:
        """Whether it has an optimizer."""
        return self.optimizer is not None


def models_of(config: Config) -> dict[str, ModelOfRun]:
    """Return the models that the loops build by the names of their sections, the policy first."""
    models = {"policy": policy_of(config)}
    if config.has_reference:
        models["reference"] = reference_of(config)
    if config.learns_from_samples and config.reward_model is not None:
        models["reward_model"] = reward_model_of(config, config.reward_model)
    if config.has_critic:
        models["critic"] = critic_of(config)
    return models


def policy_of(config: Config) -> ModelOfRun:
    """Return the model that learns, a policy or a reward model."""
    return ModelOfRun(
        name="policy",
        role=config.policy,
        path=config.model.path,
        path_key="model.path",
        is_random=config.model.init == "random",
        gives_values=config.trains_reward_model,
        optimizer=config.optimizer,
    )


def reference_of(config: Config) -> ModelOfRun:
    """Return the frozen model that the policy is compared with."""
    role = config.reference or ReferenceConfig.model_validate(config.policy.model_dump())
    return _other(config, "reference", role, role.path)


def reward_model_of(config: Config, role: RewardModelConfig) -> ModelOfRun:
    """Return the frozen model that scores the responses which train the policy."""
    return _other(config, "reward_model", role, role.path, gives_values=True)


def critic_of(config: Config) -> ModelOfRun:
    """Return the model that learns what reward to expect."""
    role = config.critic or CriticConfig.model_validate(config.policy.model_dump())
    optimizer = role.optimizer or config.optimizer
    return _other(config, "critic", role, role.path, gives_values=True, optimizer=optimizer)


def _other(
    config: Config,
    name: str,
    role: RoleConfig,
    path: Path | None,
    *,
    gives_values: bool = False,
    optimizer: OptimizerConfig | None = None,
) -> ModelOfRun:
    """Return a model beside the policy; without a folder of its own it starts as the policy does."""
    return ModelOfRun(
        name=name,
        role=role,
        path=path or config.model.path,
        path_key="model.path" if path is None else f"{name}.path",
        is_random=path is None and config.model.init == "random",
        gives_values=gives_values,
        optimizer=optimizer,
    )
