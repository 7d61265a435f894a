"""The place where a configuration key exists: its type, default, unit and meaning; those of scorers and environments are in
``megarl/builtin``. Imports no torch."""

from megarl.builtin.environments import EnvironmentConfig
from megarl.builtin.sandbox import SandboxConfig
from megarl.builtin.scorers import ScorerConfig
from megarl.builtin.scorers.document_qa import JudgeConfig
from megarl.config.schema.algorithm import (
    ADVANTAGES,
    SURROGATES,
    AlgorithmConfig,
    ClipConfig,
    EntropyControlConfig,
    GAEConfig,
    KLConfig,
    RewardShapingConfig,
    SamplerCorrectionConfig,
)
from megarl.config.schema.curriculum import CurriculumConfig, PromotionConfig, StageConfig
from megarl.config.schema.data import (
    DataConfig,
    DatasetsSource,
    DataSource,
    EvaluationConfig,
    JsonlSource,
    MixtureSource,
    ReasoningGymSource,
    RewardsConfig,
    RowSource,
    SamplingConfig,
    SFTConfig,
    TaskConfig,
)
from megarl.config.schema.preference import REFERENCE_FREE, PreferenceConfig
from megarl.config.schema.roles import (
    CriticConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    RewardModelConfig,
    RoleConfig,
)
from megarl.config.schema.rollout import (
    AsynchronousConfig,
    EmbeddedEngineConfig,
    EngineServerConfig,
    PartialConfig,
    RepetitionStopConfig,
    RolloutConfig,
    WeightTransferConfig,
)
from megarl.config.schema.run import CheckpointConfig, Config, ObserveConfig, PreferenceRun, RewardModelRun, RLRun, Rows, SFTRun
from megarl.section import Section

__all__ = [
    "ADVANTAGES",
    "REFERENCE_FREE",
    "SURROGATES",
    "AlgorithmConfig",
    "AsynchronousConfig",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "CriticConfig",
    "CurriculumConfig",
    "DataConfig",
    "DataSource",
    "DatasetsSource",
    "EmbeddedEngineConfig",
    "EngineServerConfig",
    "EntropyControlConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GAEConfig",
    "JsonlSource",
    "JudgeConfig",
    "KLConfig",
    "MixtureSource",
    "ModelConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PartialConfig",
    "PreferenceConfig",
    "PreferenceRun",
    "PromotionConfig",
    "RLRun",
    "ReasoningGymSource",
    "ReferenceConfig",
    "RepetitionStopConfig",
    "RewardModelConfig",
    "RewardModelRun",
    "RewardShapingConfig",
    "RewardsConfig",
    "RoleConfig",
    "RolloutConfig",
    "RowSource",
    "Rows",
    "SFTConfig",
    "SFTRun",
    "SamplerCorrectionConfig",
    "SamplingConfig",
    "SandboxConfig",
    "ScorerConfig",
    "Section",
    "StageConfig",
    "TaskConfig",
    "WeightTransferConfig",
]
