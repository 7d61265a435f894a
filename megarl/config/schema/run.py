"""One run: its sections, and those that belong to no other file."""

from pathlib import Path
from typing import Literal

from megarl.config.schema.algorithm import AlgorithmConfig
from megarl.config.schema.curriculum import CurriculumConfig
from megarl.config.schema.data import DataConfig, EvaluationConfig, RewardsConfig, SFTConfig
from megarl.config.schema.preference import PreferenceConfig
from megarl.config.schema.roles import CriticConfig, ModelConfig, OptimizerConfig, ReferenceConfig, RewardModelConfig, RoleConfig
from megarl.config.schema.rollout import RolloutConfig
from megarl.section import Section, key


class CheckpointConfig(Section):
    """Checkpoints of the run."""

    every: int = key(0, "steps", "Save after every so many steps; 0 means only at the end.", ge=0)
    keep: int = key(2, "checkpoints", "Keep the newest so many; older ones are deleted after a newer one is whole.", ge=1)
    asynchronous: bool = key(False, "-", "Write in the background while training goes on.")
    export: bool = key(True, "-", "Write the policy, and the critic if there is one, as Hugging Face folders at the end.")


class ObserveConfig(Section):
    """What is logged and watched."""

    rollouts_per_step: int = key(8, "responses", "Sampled responses written to rollouts/ at each step.", ge=0)
    tensorboard: bool = key(True, "-", "Write TensorBoard files.")
    progress: bool = key(True, "-", "Show the progress display.")
    max_logprob_gap: float = key(
        0.1, "nats", "The run ends at its first step when the mean |trainer - sampler| log-probability gap is above this.", gt=0
    )
    min_entropy: float = key(0.0, "nats", "Warn when the mean token entropy falls below this.", ge=0)
    min_entropy_share: float = key(
        0.1, "-", "Warn when the mean token entropy falls below this share of the run's first; 0 never warns.", ge=0, lt=1
    )
    kl_reference: bool = key(
        False,
        "-",
        "Build the reference model and log the policy's divergence from it also where algorithm.kl.place is none; with a KL term "
        "it is always logged.",
    )
    stall_warning: float = key(120.0, "seconds", "Warn, naming the prompts, when no response has come for so long.", gt=0)


class Config(Section):
    """One run."""

    kind: Literal["rl", "sft", "preference", "reward_model"] = key(
        ..., "-", "Reinforcement learning, supervised fine-tuning, or training of a policy or a reward model on preference pairs."
    )
    steps: int = key(..., "steps", "Length of the run: rollout-and-update steps for rl, optimizer steps for the others.", ge=0)
    seed: int = key(0, "-", "Seed of everything random in the run.", ge=0)
    run_dir: Path = key(Path("runs/default"), "folder", "Where the run writes; --run-dir overrides it.")
    distributed_timeout: float = key(1800.0, "seconds", "Time a collective may take before the run ends with an error.", gt=0)
    model: ModelConfig = key(..., "-", "The model.")
    policy: RoleConfig = key(RoleConfig, "-", "The trained model's layout.")
    reference: ReferenceConfig | None = key(None, "-", "The reference model's layout; the policy's when not given.")
    critic: CriticConfig | None = key(None, "-", "The critic's layout and optimizer; the policy's when not given.")
    reward_model: RewardModelConfig | None = key(None, "-", "A reward model beside the scorers; none when not given.")
    optimizer: OptimizerConfig = key(OptimizerConfig, "-", "The policy's optimizer.")
    algorithm: AlgorithmConfig = key(AlgorithmConfig, "-", "The RL method.")
    sft: SFTConfig = key(SFTConfig, "-", "Settings of kind: sft.")
    preference: PreferenceConfig = key(PreferenceConfig, "-", "Settings of kind: preference and kind: reward_model.")
    rollout: RolloutConfig = key(RolloutConfig, "-", "Sampling.")
    data: DataConfig = key(..., "-", "Training data.")
    rewards: RewardsConfig = key(RewardsConfig, "-", "Rewards.")
    evaluation: EvaluationConfig = key(EvaluationConfig, "-", "Evaluation.")
    curriculum: CurriculumConfig | None = key(None, "-", "Stages of growing context; one stage when not given.")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "-", "Checkpoints.")
    observe: ObserveConfig = key(ObserveConfig, "-", "Logging.")
