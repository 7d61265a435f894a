"""One run: its sections, those that belong to no other file, and the kinds of run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

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


Rows = Literal["prompts", "examples", "pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """What one optimizer step, or with rollouts one step of the run, trains on where everything is as long as it may be.

    Attributes:
        units: how many sequences, or pairs of them.
        unit_tokens: of one of them, which one micro-batch holds.
        longest: tokens of the longest sequence.
        longest_words: the same, as a message says it.
        trained_share: of the tokens.
    """

    units: int
    unit_tokens: int
    longest: int
    longest_words: str
    trained_share: float = 1.0

    @property
    def tokens(self) -> int:
        """The tokens of all units."""
        return self.units * self.unit_tokens


class Config(Section):
    """One run.

    ``kind`` chooses one of the classes below, which answer what others ask of a kind. All have all sections: a file is of another
    kind with ``--set kind=...``, and what it then has too much is named (``unused_settings``), not refused.

    Attributes:
        rows: what rows of data.train are made into.
        own_sections: those that only some kinds use, and this one does.
        learns_from_samples: whether it trains on what the policy samples.
        trains_reward_model: whether the model that learns gives a score for each response, in the place of a policy.
    """

    rows: ClassVar[Rows]
    own_sections: ClassVar[frozenset[str]] = frozenset()
    learns_from_samples: ClassVar[bool] = False
    trains_reward_model: ClassVar[bool] = False

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

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Let the class of its kind read a run; of a kind that there is not, this class says so."""
        kind = obj.get("kind") if cls is Config and isinstance(obj, dict) else None
        of_its_kind: Any = KINDS[kind] if isinstance(kind, str) and kind in KINDS else super()
        return of_its_kind.model_validate(obj, **options)

    @property
    def trains_on_pairs(self) -> bool:
        """Whether rows of the data have a chosen and a rejected response."""
        return self.rows == "pairs"

    @property
    def samples_responses(self) -> bool:
        """Whether the policy answers prompts: to train on the answers, or only to be evaluated."""
        return False

    @property
    def samples_from_embedded(self) -> bool:
        """Whether it trains on what the embedded engine samples."""
        return self.learns_from_samples and self.rollout.server is None

    @property
    def has_reference(self) -> bool:
        """Whether something is compared with the reference model."""
        return False

    @property
    def has_critic(self) -> bool:
        """Whether a critic learns beside the policy."""
        return False

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in one step of the run."""
        return 1

    @property
    def trained_temperature(self) -> float:
        """Softmax temperature of the log-probabilities that it trains on."""
        return 1.0

    @property
    def tokens_behind(self) -> int:
        """Tokens behind each response that the model which learns reads too: a reward model scores at one."""
        return int(self.trains_reward_model)

    @property
    def step_size(self) -> StepSize:
        """What one step trains on, as StepSize describes."""
        raise NotImplementedError("of a kind only")


class RLRun(Config):
    """Reinforcement learning: the policy learns from the responses that it samples."""

    rows: ClassVar[Rows] = "prompts"
    own_sections: ClassVar[frozenset[str]] = frozenset({"algorithm", "reward_model", "data.sampling"})
    learns_from_samples: ClassVar[bool] = True

    @property
    def samples_responses(self) -> bool:
        """Whether the policy answers prompts, as Config describes."""
        return True

    @property
    def has_reference(self) -> bool:
        """Whether the reference model is needed, as Config describes."""
        return self.algorithm.kl.place != "none" or self.observe.kl_reference

    @property
    def has_critic(self) -> bool:
        """Whether a critic learns, as Config describes."""
        return self.algorithm.has_critic

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in one step of the run."""
        return self.algorithm.updates_per_step

    @property
    def trained_temperature(self) -> float:
        """The temperature that rollouts are sampled at."""
        return self.rollout.temperature

    @property
    def step_size(self) -> StepSize:
        """What one step trains on, as StepSize describes."""
        rollout = self.rollout
        return StepSize(
            units=rollout.prompts_per_step * rollout.samples_per_prompt,
            unit_tokens=rollout.longest,
            longest=rollout.longest,
            longest_words=rollout.longest_words,
            trained_share=rollout.max_new_tokens / rollout.longest,
        )


class SFTRun(Config):
    """Supervised fine-tuning on given answers."""

    rows: ClassVar[Rows] = "examples"
    own_sections: ClassVar[frozenset[str]] = frozenset({"sft"})

    @property
    def samples_responses(self) -> bool:
        """Whether the policy answers prompts, as Config describes."""
        return self.evaluation.data is not None

    @property
    def step_size(self) -> StepSize:
        """What one step trains on, as StepSize describes."""
        longest = self.sft.max_tokens
        return StepSize(
            units=self.sft.examples_per_step, unit_tokens=longest, longest=longest, longest_words=f"sft.max_tokens {longest}"
        )


class _PairsRun(Config):
    """Training on pairs of a chosen and a rejected response."""

    rows: ClassVar[Rows] = "pairs"
    own_sections: ClassVar[frozenset[str]] = frozenset({"preference"})

    @property
    def step_size(self) -> StepSize:
        """What one step trains on, as StepSize describes."""
        longest = self.preference.max_tokens
        return StepSize(
            units=self.preference.pairs_per_step,
            unit_tokens=2 * (longest + self.tokens_behind),
            longest=longest,
            longest_words=f"preference.max_tokens {longest}",
        )


class PreferenceRun(_PairsRun):
    """Training of a policy on preference pairs."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference model is needed, as Config describes."""
        return self.preference.has_reference


class RewardModelRun(_PairsRun):
    """Training of a reward model on preference pairs."""

    trains_reward_model: ClassVar[bool] = True


KINDS: dict[str, type[Config]] = {
    "rl": RLRun,
    "sft": SFTRun,
    "preference": PreferenceRun,
    "reward_model": RewardModelRun,
}
